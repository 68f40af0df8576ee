"""Sentence vectors: how the teacher's sentence-transformers files make them of hidden states, for the student as well.

A sentence-transformers folder is a transformers folder with a few files more: `modules.json` lists what follows the
Transformer (pooling, then perhaps dense layers and a normalisation), each with a folder of its own; beside it stand the
prompts and the length at which texts are cut. None of them knows how many layers the Transformer has, so they fit every
student of the teacher's width.

B batch, N tokens, d hidden size.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from minilm.errors import UsageError

MODULES = "modules.json"
BESIDE = ("config_sentence_transformers.json", "sentence_*_config.json")  # prompts; the length at which a text is cut
ON_THE_HUB = (MODULES, *BESIDE, "[1-9]_*/*")

# name: the key of the files from before they named it
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
MEAN = ("mean",)


class SentenceFiles(NamedTuple):
    """A teacher's sentence-transformers files."""

    modules: list[dict[str, Any]]  # as modules.json lists them, the Transformer at the top of the folder
    files: dict[str, Path]  # all others, by their names in the folder
    pooling: tuple[str, ...]  # names of POOLINGS, in the order in which they are concatenated

    def copy_to(self, student: Path) -> None:
        """Writes them into a student's folder."""
        for name, source in self.files.items():
            (student / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, student / name)
        (student / MODULES).write_text(json.dumps(self.modules, indent=2) + "\n", encoding="utf-8")


def sentence_files(teacher: str) -> SentenceFiles | None:
    """The files of a teacher, a folder or a name on the hub.

    A Transformer in a folder of its own (`0_Transformer`) has them one level up. None where there are none, or none
    that pool a Transformer's hidden states by sentence-transformers' own classes.

    Raises:
        ValueError: a modules.json or a pooling that says nothing intelligible.
    """
    transformer = Path(teacher)
    if not transformer.is_dir():
        transformer = Path(snapshot_download(teacher, allow_patterns=list(ON_THE_HUB)))
    for folder in (transformer, transformer.resolve().parent):
        if (path := folder / MODULES).is_file():
            try:
                return _read(folder, transformer, json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UsageError(
                    f"cannot read the sentence-transformers modules in {str(path)!r} ({reason})"
                ) from error
    return None


def _read(folder: Path, transformer: Path, modules: list[dict[str, Any]]) -> SentenceFiles | None:
    kinds = [module["type"].rpartition(".")[2] for module in modules]  # their modules have had several names
    own = all(module["type"].startswith("sentence_transformers.") for module in modules)
    if not own or kinds[:1] != ["Transformer"] or kinds.count("Pooling") != 1:
        return None
    first, *others = modules
    if (folder / first["path"]).resolve() != transformer.resolve():
        return None
    files = {path.name: path for beside in (folder, transformer) for name in BESIDE for path in beside.glob(name)}
    for module in others:
        place = folder / module["path"]
        if not place.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"the path {module['path']!r} leads out of the folder")
        if module["path"]:
            files |= {path.relative_to(folder).as_posix(): path for path in place.rglob("*") if path.is_file()}
    config = json.loads((folder / others[kinds.index("Pooling") - 1]["path"] / "config.json").read_text("utf-8"))
    return SentenceFiles([first | {"path": ""}, *others], files, _pooling(config))


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Sequence[str]) -> Tensor:
    """(B, d · number of poolings) float32: the vectors of sentences, as sentence-transformers pools them.

    Args:
        hidden: (B, N, d), last hidden states.
        attention_mask: (B, N), nonzero = token.
        pooling: names of POOLINGS.
    """
    hidden, token = hidden.float(), attention_mask.bool()
    first, last = token.int().argmax(1), hidden.shape[1] - 1 - token.int().flip(1).argmax(1)
    sentence = torch.arange(len(hidden), device=hidden.device)
    place = torch.arange(1, hidden.shape[1] + 1, device=hidden.device) - first[:, None]

    def mean(weight: Tensor) -> Tensor:
        weight = (weight * token).unsqueeze(2)
        return torch.where(token.unsqueeze(2), hidden * weight, 0).sum(1) / weight.sum(1)

    vectors = {
        "cls": lambda: hidden[sentence, first],
        "max": lambda: hidden.masked_fill(~token.unsqueeze(2), -torch.inf).amax(1),
        "mean": lambda: mean(torch.ones_like(place)),
        "mean_sqrt_len_tokens": lambda: mean(torch.ones_like(place)) * token.sum(1, keepdim=True).sqrt(),
        "weightedmean": lambda: mean(place),
        "lasttoken": lambda: hidden[sentence, last],
    }
    return torch.cat([vectors[name]() for name in pooling], dim=1)


def _pooling(config: dict[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode") or [name for name, key in POOLINGS.items() if config.get(key)] or MEAN
    names = (named,) if isinstance(named, str) else tuple(named)
    if unknown := [name for name in names if name not in POOLINGS]:
        raise UsageError(f"pooling {unknown[0]!r} is none of {', '.join(POOLINGS)}")
    return names
