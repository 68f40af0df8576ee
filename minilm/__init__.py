"""Distil a Transformer into a small one by its self-attention relations (MiniLM v1 and v2).

The loss is here at once; what needs transformers is imported when it is first named.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minilm.loss import MiniLMLoss
from minilm_kernels import fused_minilm_loss, relation_kl

if TYPE_CHECKING:
    from minilm._capture import attention_qkv, capture
    from minilm.students import build_student
    from minilm.trainer import DistillationModel, DistillationTrainer

# No name here may be a module's: importing the module would put it in the name's place.
_HOMES = {
    "attention_qkv": "minilm._capture",
    "capture": "minilm._capture",
    "build_student": "minilm.students",
    "DistillationModel": "minilm.trainer",
    "DistillationTrainer": "minilm.trainer",
}

__all__ = [
    "DistillationModel",
    "DistillationTrainer",
    "MiniLMLoss",
    "attention_qkv",
    "build_student",
    "capture",
    "fused_minilm_loss",
    "relation_kl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minilm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
