"""A batch as the models take it, as the loss takes it, and how much it holds: padded texts, packed texts, or images.

A padded batch has `input_ids` and `attention_mask` (B, N), and may have `prefix_lengths` (B,): UniLM's sequence-to-
sequence mask, under which the first tokens of a decoder see each other both ways. A packed batch has rows of several
sequences, as `minilm.data.packing` makes them: `sequence_ids` (B, L) tell them apart, the models get a block-diagonal
mask and positions that restart, and the loss gets the tokens of all rows as one row without padding, with `cu_seqlens`.
A batch flattened as transformers does it becomes such a batch (`as_packed`).
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.capture import QKV
from minilm.models.probes import base_of, captured_and_hidden, is_causal, model_tried, moved_tokens, random_tokens

Batch = Mapping[str, Tensor]
FOR_THE_LOSS = ("sequence_ids", "cu_seqlens", "token_index", "prefix_lengths", "labels")
NO_LABEL = -100  # of a token, as transformers has it
_NO_TEXT = ("pixel_values", "input_values", "input_features")
_OF_FLATTENING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_TRIED_LENGTHS, _TRIED_WINDOW = (9, 6), 3
# Whether a window of w lets a token see those w away, by class and causality: by default as transformers' own mask
# functions do; what was found otherwise, when a model was tried.
_window_is_inclusive: dict[tuple[type, bool], bool] = {}


def as_packed(batch: Batch) -> dict[str, Tensor]:
    """The batch, and one of several sequences in a row, told by transformers' means, as a packed one.

    Those are `cu_seq_lens_q`, `seq_idx`, or `position_ids` that restart (`DataCollatorWithFlattening`). The models then
    get a mask, which keeps the sequences apart in every model and under every attention.
    """
    own = {name: tensor for name, tensor in batch.items() if name not in _OF_FLATTENING}
    if "sequence_ids" in batch or "input_ids" not in batch:
        return own
    mask = batch.get("attention_mask")
    token = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    begins = _beginnings(batch, token)
    if begins is None:
        return own
    sequence_ids = begins.cumsum(1) * token
    place = torch.arange(token.shape[1], device=token.device)
    token_index = token.flatten().nonzero().flatten()
    row = torch.arange(len(token), device=token.device)[:, None]
    _, lengths = torch.unique_consecutive(
        (row * token.shape[1] + sequence_ids).flatten()[token_index], return_counts=True
    )
    own.pop("attention_mask", None)
    return own | {
        "position_ids": (place - torch.where(begins, place, 0).cummax(1).values) * token,
        "sequence_ids": sequence_ids.int(),
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "token_index": token_index,
    }


def _beginnings(batch: Batch, token: Tensor) -> Tensor | None:
    """(B, N) bool, where sequences begin; None for a batch of one sequence a row."""
    begins = torch.zeros_like(token)
    begins.scatter_(1, token.int().argmax(1, keepdim=True), True)
    if "cu_seq_lens_q" in batch:
        if len(token) != 1 or batch["cu_seq_lens_q"][-1] != token.shape[1]:
            raise UsageError(
                f"cu_seq_lens_q ends at {int(batch['cu_seq_lens_q'][-1])}, the batch is {tuple(token.shape)}: "
                "it tells sequences apart in one row of as many tokens"
            )
        inner = batch["cu_seq_lens_q"][1:-1].long()
        begins[0, inner[inner < token.shape[1]]] = True
    elif "seq_idx" in batch:
        begins[:, 1:] |= batch["seq_idx"].diff(dim=1) != 0
    elif "position_ids" in batch and batch["position_ids"].shape == token.shape:
        step = batch["position_ids"].diff(dim=1)
        if "attention_mask" not in batch:
            begins[:, 1:] |= step != 1  # as transformers reads them
        else:  # behind padding or a hole positions may jump
            begins[:, 1:] |= (step < 1) & token[:, 1:] & token[:, :-1]
        flattened = "attention_mask" not in batch and len(token) == 1
        if begins.sum() == len(token) and not flattened:
            return None
    else:
        return None
    return begins & token


def model_inputs(model: PreTrainedModel, batch: Batch, causal: bool) -> dict[str, Any]:
    """What the model's forward takes; `causal`: a decoder, whose 4-D masks must say so themselves."""
    inputs: dict[str, Any] = {name: x for name, x in in_its_dtype(model, batch).items() if name not in FOR_THE_LOSS}
    if "sequence_ids" in batch:
        allowed = block_diagonal_mask(batch["sequence_ids"], causal)
        inputs["position_ids"] = batch["position_ids"] + first_position(model)
    elif "prefix_lengths" in batch:
        allowed = _prefix_mask(batch["attention_mask"], batch["prefix_lengths"])
    else:
        return inputs
    inputs["attention_mask"] = _masks_by_layer(model, allowed, causal)
    return inputs


def block_diagonal_mask(sequence_ids: Tensor, causal: bool) -> Tensor:
    """(B, 1, L, L) bool, true where token i (third axis) may attend to token j (fourth): both in the same sequence.

    Padding attends to padding, so that no row of the attention is empty.

    Args:
        sequence_ids: (B, L), as `PackingCollator` gives them.
        causal: and only where j <= i.
    """
    mask = (sequence_ids[:, :, None] == sequence_ids[:, None, :]).unsqueeze(1)
    return mask.tril() if causal else mask


def by_token(model: PreTrainedModel, batch: Batch, tokens: int | None) -> Batch:
    """The batch with the mask of the model's N `tokens` (None: unknown), where its own is of the samples of a sound.

    Raises:
        ValueError: a mask of another length, and a model that does not say which of its tokens are padding.
    """
    mask = batch.get("attention_mask")
    if mask is None or not any(name in batch for name in _NO_TEXT) or tokens in (None, mask.shape[-1]):
        return batch
    shorten = getattr(base_of(model), "_get_feature_vector_attention_mask", None)  # of wav2vec 2.0 and its kin
    if shorten is None:
        what = "text and pixels: leave out pixel_values"
        if "input_ids" not in batch:
            what = "every example, padding or not: leave out the mask"
        raise UsageError(
            f"attention_mask is {tuple(mask.shape)}, and {type(model).__name__} makes {tokens} tokens of {what}"
        )
    return {**batch, "attention_mask": shorten(tokens, mask)}


def relation_qkv(qkv: QKV, batch: Batch) -> QKV:
    """q, k, v (B, H, N, D) as the loss takes them: of a packed batch the tokens alone, (1, H, T, D)."""
    if "token_index" not in batch:
        return qkv
    q, k, v = (
        x.transpose(1, 2).flatten(0, 1).index_select(0, batch["token_index"]).transpose(0, 1).unsqueeze(0) for x in qkv
    )
    return q, k, v


def in_its_dtype(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The batch with pixels and sounds in the model's dtype: not every model turns them itself."""
    return {name: x.to(model.dtype) if name in _NO_TEXT else x for name, x in batch.items()}


def relation_mask(batch: Batch) -> dict[str, Tensor | None]:
    """The arguments of `MiniLMLoss` that say which tokens see each other."""
    if "cu_seqlens" in batch:
        return {"cu_seqlens": batch["cu_seqlens"]}
    return {"attention_mask": batch.get("attention_mask"), "prefix_lengths": batch.get("prefix_lengths")}


def token_mask(batch: Batch) -> Tensor | None:
    """(B, N), nonzero where there is a token; None where everything is one."""
    return batch["sequence_ids"] if "sequence_ids" in batch else batch.get("attention_mask")


def count_sequences(batch: Batch) -> Tensor:
    """() int64: the sequences that have tokens, on the batch's device."""
    if "cu_seqlens" in batch:
        return (batch["cu_seqlens"].diff() > 0).sum()
    mask = token_mask(batch)
    if mask is None:
        first = next(iter(batch.values()))
        return torch.tensor(len(first), device=first.device)
    return mask.bool().any(dim=1).sum()


def count_tokens(batch: Batch) -> Tensor:
    """() int64: the tokens that are no padding, on the batch's device; of images and sounds 0."""
    mask, first = token_mask(batch), next(iter(batch.values()))
    if any(name in batch for name in _NO_TEXT):
        return torch.tensor(0, device=first.device)
    return torch.tensor(batch["input_ids"].numel(), device=first.device) if mask is None else (mask != 0).sum()


def count_labels(batch: Batch) -> Tensor:
    """() int64: the tokens that have labels, on the batch's device."""
    return (labels_of(batch) != NO_LABEL).sum()


def labels_of(batch: Batch) -> Tensor:
    """(B, N) int64; -100 where there is none. Raises `ValueError` for a batch without labels."""
    if "labels" not in batch:
        raise UsageError(
            "the objective predicts masked tokens, and the batch has no labels: give DistillationTrainer masking="
            "Masking(tokenizer), or a data_collator that makes them"
        )
    return batch["labels"]


def count_examples(batch: Batch) -> Tensor:
    """() int64: the rows, on the batch's device."""
    first = next(iter(batch.values()))
    return torch.full((), len(first), device=first.device)  # of the device itself, where a copy would wait


def first_position(model: nn.Module) -> int:
    """The position of a sequence's first token: RoBERTa and its kin count from behind the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def check_batch(model: PreTrainedModel, layout: str, causal: bool) -> None:
    """`check_packable` for batches with `layout` "sequence_ids", `check_prefixes` for those with "prefix_lengths".

    Raises:
        ValueError: as these do; relations of a packed batch that are `causal` where the model is not, or the reverse.
    """
    if layout == "prefix_lengths":
        check_prefixes(model)
    elif check_packable(model) != causal:
        sees = "sees" if causal else "does not see"
        raise UsageError(
            f"the loss is causal={causal} and {type(model).__name__} {sees} tokens ahead: "
            f"packed texts get one mask for both, so give MiniLMLoss causal={not causal}"
        )


def check_packable(model: PreTrainedModel) -> bool:
    """Tries on two short sequences in a row whether the model computes what it makes of them one by one.

    Returns whether it is causal, which the mask of a packed row says.

    What is compared are q, k, v of its last layer and its output. Where layers see a window only, the trial also finds
    whether that takes in a token just as far away, with a window narrower than the sequences.

    Raises:
        ValueError: it does not, or its attention function takes no mask.
    """
    name, attention = type(model).__name__, model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise UsageError(f"packing needs attention by 'sdpa' or 'eager', {name} was loaded with {attention!r}")
    if "position_ids" not in inspect.signature(base_of(model).forward).parameters:
        raise UsageError(f"packing needs positions that restart, and {name} takes no position_ids: leave out --packing")
    causal = is_causal(model)
    key = type(base_of(model)), causal
    differences = []
    with _narrow_window(model):
        for inclusive in (not causal, causal) if _has_window(model) else (not causal,):
            _window_is_inclusive[key] = inclusive
            with model_tried(model, "take packed rows: leave out --packing"):
                differences.append(_packed_against_alone(model, causal))
            if differences[-1] <= _rounding(model):
                return causal
    del _window_is_inclusive[key]
    raise UsageError(
        f"{name} does not keep packed sequences apart: its q, k, v or output differ by {min(differences):.0e} from "
        f"those of the sequences alone, where {_rounding(model):.0e} would be rounding: leave out --packing"
    )


def check_prefixes(model: PreTrainedModel) -> None:
    """Tries whether tokens of a prefix see each other both ways in the model, and no token one behind the prefix.

    Raises:
        ValueError: they do not.
    """
    base = base_of(model)
    tokens = random_tokens(base, 9)
    ids, prefix = tokens[None, :8], torch.tensor([4], device=tokens.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prefix_lengths": prefix}
    with model_tried(model, "take the mask of a prefix"):
        inputs = model_inputs(base, batch, True)
        last_of_prefix, behind = (bool(moved[:3].any()) for moved in moved_tokens(base, inputs, (3, 4), tokens[8]))
    if behind or not last_of_prefix:
        seen = "also see" if behind else "do not see each other, nor"
        raise UsageError(
            f"{type(model).__name__} does not keep to the mask of a prefix: its tokens {seen} what is behind it"
        )


def _packed_against_alone(model: PreTrainedModel, causal: bool) -> float:
    """The largest relative difference of q, k, v and output of the sequences packed and one by one."""
    base = base_of(model)
    tokens = random_tokens(base, sum(_TRIED_LENGTHS))
    apart = [ids[None] for ids in tokens.split(_TRIED_LENGTHS)]
    lengths = torch.tensor(_TRIED_LENGTHS, device=tokens.device)
    row = as_packed({"input_ids": tokens[None], "cu_seq_lens_q": nn.functional.pad(lengths.cumsum(0), (1, 0))})
    qkv, hidden = captured_and_hidden(base, model_inputs(base, row, causal))
    together = (*qkv, hidden)
    alone = [captured_and_hidden(base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in apart]
    one_by_one = [torch.cat(parts, dim=-2) for parts in zip(*((*qkv, hidden) for qkv, hidden in alone), strict=True)]
    pairs = zip(together, one_by_one, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def _rounding(model: PreTrainedModel) -> float:
    return max(1e-4, 4 * torch.finfo(model.dtype).eps)


@contextmanager
def _narrow_window(model: PreTrainedModel) -> Iterator[None]:
    if not _has_window(model):
        yield
        return
    config = base_of(model).config
    window: int = config.sliding_window
    config.sliding_window = min(window, _TRIED_WINDOW)  # read at every forward, when masks are made
    try:
        yield
    finally:
        config.sliding_window = window


def _has_window(model: PreTrainedModel) -> bool:
    kinds = getattr(base_of(model).config, "layer_types", None)
    return getattr(base_of(model).config, "sliding_window", None) is not None and (
        not kinds or "sliding_attention" in kinds
    )


def _prefix_mask(attention_mask: Tensor, prefix_lengths: Tensor) -> Tensor:
    """(B, 1, N, N) bool: token j is seen by token i if j <= i or j lies in the prefix; padding sees itself."""
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    seen = (position <= position[:, None]) | (position < prefix_lengths[:, None, None])
    token = attention_mask.bool()
    allowed = seen & token[:, None, :] & token[:, :, None]
    return (allowed | (position == position[:, None])).unsqueeze(1)


def _masks_by_layer(model: PreTrainedModel, allowed: Tensor, causal: bool) -> Any:
    """`allowed` as the model's layers take it: a dict where some of them see a window only."""
    if not _has_window(model):
        return _as_attended(model, allowed)
    config = base_of(model).config
    inclusive = _window_is_inclusive.get((type(base_of(model)), causal), not causal)
    position = torch.arange(allowed.shape[-1], device=allowed.device)
    distance = position[:, None] - position
    distance = distance if causal else distance.abs()
    near = _as_attended(model, allowed & (distance < config.sliding_window + inclusive))
    kinds = getattr(config, "layer_types", None)
    return {"full_attention": _as_attended(model, allowed), "sliding_attention": near} if kinds else near


def _as_attended(model: PreTrainedModel, allowed: Tensor) -> Tensor:
    """Bool for SDPA, added to the scores by eager attention."""
    if model.config._attn_implementation != "eager":
        return allowed
    return torch.zeros_like(allowed, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)
