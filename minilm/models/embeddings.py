"""Sentence vectors: how the teacher's sentence-transformers files make them of hidden states, for the student as well.

A sentence-transformers folder is a transformers folder with a few files more: `modules.json` lists what follows the
Transformer (pooling, then perhaps dense layers and a normalisation), each with a folder of its own; beside it stand the
prompts and the length at which texts are cut. None of them knows how many layers the Transformer has, so they fit every
student of the teacher's width.

B batch, N tokens, d hidden size; S sequences and T tokens of a packed batch.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from minilm.errors import UsageError
from minilm.models.batches import Batch, token_mask

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
    include_prompt: bool  # whether a prompt's tokens are pooled too

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
            except Exception as error:  # what the files may hold has no end
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
    prompt = bool(config.get("include_prompt", True))
    return SentenceFiles([first | {"path": ""}, *others], files, _pooling(config), prompt)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Sequence[str]) -> Tensor:
    """(B, d · number of poolings) float32: the vectors of sentences, as sentence-transformers pools them.

    Args:
        hidden: (B, N, d), last hidden states; float64 stays float64.
        attention_mask: (B, N), nonzero = token.
        pooling: names of POOLINGS.
    """
    hidden, token = _wide(hidden), attention_mask.bool()
    first, last = token.int().argmax(1), hidden.shape[1] - 1 - token.int().flip(1).argmax(1)
    sentence = torch.arange(len(hidden), device=hidden.device)
    place = torch.arange(1, hidden.shape[1] + 1, device=hidden.device) - first[:, None]
    is_token = token.unsqueeze(2)
    return _pool(
        pooling,
        hidden,
        place,
        total=lambda x: torch.where(is_token, x, 0).sum(1),
        greatest=lambda: hidden.masked_fill(~is_token, -torch.inf).amax(1),
        ends=(hidden[sentence, first], hidden[sentence, last]),
    )


def pool_packed(tokens: Tensor, cu_seqlens: Tensor, pooling: Sequence[str]) -> Tensor:
    """(S, d · number of poolings): as `pool`, of S sequences one behind the other.

    Args:
        tokens: (T, d), their hidden states without padding.
        cu_seqlens: (S + 1,), where each begins, and T.
    """
    tokens, lengths = _wide(tokens), cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(lengths, output_size=len(tokens))
    place = torch.arange(1, len(tokens) + 1, device=tokens.device) - cu_seqlens[sequence]
    firsts, lasts = cu_seqlens[:-1].clamp(max=len(tokens) - 1), (cu_seqlens[1:] - 1).clamp(min=0)
    return _pool(
        pooling,
        tokens,
        place,
        # Unlike index_add it adds up in one order; `unsafe` leaves out checks that would wait for the device.
        total=lambda x: torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True),
        greatest=lambda: torch.segment_reduce(tokens, "max", lengths=lengths, unsafe=True),
        ends=(tokens.index_select(0, firsts), tokens.index_select(0, lasts)),
    )


def pool_batch(hidden: Tensor, batch: Batch, pooling: Sequence[str]) -> Tensor:
    """(S, d · number of poolings): the vectors of a batch's sequences, padded or packed; 0 for those without a token.

    Args:
        hidden: (B, N, d), last hidden states.
    """
    if "cu_seqlens" in batch:
        tokens = hidden.flatten(0, 1).index_select(0, batch["token_index"])
        vectors = pool_packed(tokens, batch["cu_seqlens"], pooling)
    else:
        mask = token_mask(batch)
        vectors = pool(hidden, hidden.new_ones(hidden.shape[:2]) if mask is None else mask, pooling)
    present = sequences_present(batch)
    return vectors if present is None else torch.where(present.unsqueeze(1), vectors, 0)


def sequences_present(batch: Batch) -> Tensor | None:
    """(S,) bool: which of a batch's sequences have tokens; None where all have."""
    if "cu_seqlens" in batch:
        return batch["cu_seqlens"].diff() > 0
    mask = token_mask(batch)
    return None if mask is None else mask.bool().any(dim=1)


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _pool(
    pooling: Sequence[str],
    hidden: Tensor,  # (..., d)
    place: Tensor,  # (...), of a token in its sequence, from 1
    total: Callable[[Tensor], Tensor],
    greatest: Callable[[], Tensor],
    ends: tuple[Tensor, Tensor],
) -> Tensor:
    places = place.to(hidden.dtype).unsqueeze(-1)
    ones = torch.ones_like(places)

    def mean(weights: Tensor) -> Tensor:
        return total(hidden * weights) / total(weights)

    vectors: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: ends[0],
        "max": greatest,
        "mean": lambda: mean(ones),
        "mean_sqrt_len_tokens": lambda: mean(ones) * total(ones).sqrt(),
        "weightedmean": lambda: mean(places),
        "lasttoken": lambda: ends[1],
    }
    return torch.cat([vectors[name]() for name in pooling], dim=1)


def _pooling(config: dict[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode") or [name for name, key in POOLINGS.items() if config.get(key)] or MEAN
    names = (named,) if isinstance(named, str) else tuple(named)
    if unknown := [name for name in names if name not in POOLINGS]:
        raise UsageError(f"pooling {unknown[0]!r} is none of {', '.join(POOLINGS)}")
    return names
