"""Distil a Transformer into a small one by its self-attention relations (MiniLM v1 and v2).

Everything is imported when it is first named: `import minilm` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilm.models.capture import attention_qkv, capture
    from minilm.models.students import build_student
    from minilm.objectives.loss import MiniLMLoss
    from minilm.objectives.sentence_transformers import RelationLoss
    from minilm.training.model import DistillationModel
    from minilm.training.trainer import DistillationTrainer
    from minilm_kernels import fused_minilm_loss, relation_kl

    __version__: str

# No name here may be a module's: importing the module would put it in the name's place.
_HOMES = {
    "MiniLMLoss": "minilm.objectives.loss",
    "fused_minilm_loss": "minilm_kernels",
    "relation_kl": "minilm_kernels",
    "attention_qkv": "minilm.models.capture",
    "capture": "minilm.models.capture",
    "build_student": "minilm.models.students",
    "RelationLoss": "minilm.objectives.sentence_transformers",
    "DistillationModel": "minilm.training.model",
    "DistillationTrainer": "minilm.training.trainer",
}

__all__ = [
    "DistillationModel",
    "DistillationTrainer",
    "MiniLMLoss",
    "RelationLoss",
    "attention_qkv",
    "build_student",
    "capture",
    "fused_minilm_loss",
    "relation_kl",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("fused-minilm")  # of the installed distribution
    if name not in _HOMES:
        raise AttributeError(f"module 'minilm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
