"""What follows a Transformer in a sentence-transformers folder: pooling, dense layers, normalisation; read and written.

B batch, N tokens, d hidden size, S sequences, E numbers in a vector.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from minilm.errors import UsageError
from minilm.models.batches import Batch
from minilm.models.embeddings import BESIDE, MODULES, SentenceFiles, pool_batch

_TYPES = {  # sentence-transformers' own
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
_SENTENCE = "sentence_embedding"  # what its modules hand on
_NAMES = {"module_input_name": _SENTENCE, "module_output_name": _SENTENCE}
# Without the teacher's: no prompts, and texts are cut at the tokenizer's length.
_BESIDE: dict[str, dict[str, Any]] = {
    BESIDE[0]: {
        "__version__": {"pytorch": torch.__version__, "transformers": transformers.__version__},
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": {"document": "", "query": ""},
        "similarity_fn_name": "cosine",
    },
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    },
}


class Dense(nn.Linear):
    """activation(W x + b), computed in the dtype of x."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: nn.Module | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: Tensor = self.activation(functional.linear(x, self.weight.to(x.dtype), bias))
        return result


class Normalize(nn.Module):
    """x / |x|."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1)


class SentenceHead(nn.Module):
    """Makes the vectors of sentences of last hidden states.

    Args:
        pooling: names of `minilm.models.embeddings.POOLINGS`.
        modules: what follows, `Dense` and `Normalize`.
    """

    def __init__(self, pooling: Sequence[str], modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.pooling = tuple(pooling)
        self.further = nn.Sequential(*modules)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(S, E) float32, also under autocast; of float64 hidden states (B, N, d) float64."""
        with torch.autocast(hidden.device.type, enabled=False):
            vectors: Tensor = self.further(pool_batch(hidden, batch, self.pooling))
        return vectors


def read_head(files: SentenceFiles) -> SentenceHead:
    """What the files say, with their weights.

    Raises:
        ValueError: modules other than one pooling, and dense layers and normalisations behind it; a dense layer of a
            kind that is not known here.
    """
    modules: list[nn.Module] = []
    for index, module in enumerate(files.modules[1:]):
        kind = module["type"].rpartition(".")[2]
        if (kind == "Pooling") != (index == 0) or kind not in ("Pooling", "Dense", "Normalize"):
            names = " -> ".join(module["type"].rpartition(".")[2] for module in files.modules)
            raise UsageError(
                f"the teacher's sentence-transformers modules are {names}: its vectors can be learnt where they are "
                "Transformer -> Pooling, then Dense and Normalize"
            )
        if kind == "Dense":
            modules.append(_read_dense(files.files, module["path"]))
        elif kind == "Normalize":
            modules.append(Normalize())
    return SentenceHead(files.pooling, modules)


def _read_dense(files: Mapping[str, Path], path: str) -> Dense:
    config = json.loads(files[f"{path}/config.json"].read_text("utf-8"))
    if config.get("use_residual") or any(config.get(name, _SENTENCE) != _SENTENCE for name in _NAMES):
        raise UsageError(f"the teacher's {path} is not activation(W x + b) of the sentence's vector: {config}")
    name = config.get("activation_function", "torch.nn.Tanh")
    activation = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise UsageError(f"the teacher's {path} has the activation_function {name!r}, which is no class of torch.nn")
    dense = Dense(config["in_features"], config["out_features"], config.get("bias", True), activation())
    if (weights := files.get(f"{path}/model.safetensors")) is not None:
        state = load_file(weights)
    else:
        state = torch.load(files[f"{path}/pytorch_model.bin"], map_location="cpu", weights_only=True)
    dense.load_state_dict({key.removeprefix("linear."): tensor for key, tensor in state.items()})
    return dense


def write_head(
    folder: Path, head: SentenceHead, width: int, state: Mapping[str, Tensor], teacher: SentenceFiles | None
) -> None:
    """Makes of a student's folder one that `SentenceTransformer` loads, in the form of sentence-transformers 6.

    Args:
        width: d.
        state: the head's, gathered from shards.
        teacher: whose prompts and length the student keeps.
    """
    listed = [_listed(0, "Transformer", "")]
    config = {
        "embedding_dimension": width,
        "pooling_mode": head.pooling[0] if len(head.pooling) == 1 else list(head.pooling),
        "include_prompt": teacher is None or teacher.include_prompt,
    }
    contents = [("Pooling", config)]
    for module in head.further:
        if isinstance(module, Dense):
            contents.append(("Dense", _dense_config(module)))
        else:
            contents.append(("Normalize", dict(_NAMES)))
    for index, (kind, config) in enumerate(contents, start=1):
        place = f"{index}_{kind}"
        listed.append(_listed(index, kind, place))
        _write_json(folder / place / "config.json", config)
        if kind == "Dense":
            prefix = f"further.{index - 2}."
            own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
            save_file(
                {f"linear.{key}": x.detach().cpu().contiguous() for key, x in own.items()},
                folder / place / "model.safetensors",
            )
    beside = {name: path for name, path in (teacher.files if teacher else {}).items() if "/" not in name}
    has_length = any(fnmatch(name, "sentence_*_config.json") for name in beside)  # under the name of any class
    for name, content in _BESIDE.items():
        if not (has_length and fnmatch(name, "sentence_*_config.json")):
            _write_json(folder / name, content)
    for name, path in beside.items():
        shutil.copyfile(path, folder / name)
    _write_json(folder / MODULES, listed)


def _listed(index: int, kind: str, path: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": _TYPES[kind]}


def _dense_config(dense: Dense) -> dict[str, Any]:
    return {
        "in_features": dense.in_features,
        "out_features": dense.out_features,
        "bias": dense.bias is not None,
        "activation_function": f"torch.nn.{type(dense.activation).__name__}",
        **_NAMES,
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
