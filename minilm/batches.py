"""A batch as the models take it, as the loss takes it, and how much it holds: padded texts, packed texts, or images.

A padded batch has `input_ids` and `attention_mask` (B, N), and may have `prefix_lengths` (B,): UniLM's sequence-to-
sequence mask, under which the first tokens of a decoder see each other both ways. A packed batch (`minilm.packing`) has
rows of several sequences: `sequence_ids` (B, L) tell them apart, the models get a block-diagonal mask and positions
that restart, and the loss gets the tokens of all rows as one row without padding, with `cu_seqlens`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm._capture import QKV
from minilm.packing import block_diagonal_mask

Batch = Mapping[str, Tensor]
FOR_THE_LOSS = ("sequence_ids", "cu_seqlens", "token_index", "prefix_lengths")


def model_inputs(model: PreTrainedModel, batch: Batch, causal: bool) -> dict[str, Any]:
    """What the model's forward takes; `causal`: a decoder, whose 4-D masks must say so themselves."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in FOR_THE_LOSS}
    if "sequence_ids" in batch:
        allowed = block_diagonal_mask(batch["sequence_ids"], causal)
        inputs["position_ids"] = batch["position_ids"] + first_position(model)
    elif "prefix_lengths" in batch:
        allowed = _prefix_mask(batch["attention_mask"], batch["prefix_lengths"])
    else:
        return inputs
    inputs["attention_mask"] = _masks_by_layer(model, allowed, causal)
    return inputs


def relation_qkv(qkv: QKV, batch: Batch) -> QKV:
    """q, k, v (B, H, N, D) as the loss takes them: of a packed batch the tokens alone, (1, H, T, D)."""
    if "token_index" not in batch:
        return qkv
    q, k, v = (
        x.transpose(1, 2).flatten(0, 1).index_select(0, batch["token_index"]).transpose(0, 1).unsqueeze(0) for x in qkv
    )
    return q, k, v


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
    """() int64: the tokens that are no padding, on the batch's device; of images 0."""
    mask = token_mask(batch)
    if mask is not None:
        return (mask != 0).sum()
    ids = batch.get("input_ids")
    first = next(iter(batch.values()))
    return torch.tensor(0 if ids is None else ids.numel(), device=first.device)


def first_position(model: nn.Module) -> int:
    """The position of a sequence's first token: RoBERTa and its kin count from behind the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def check_packable(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model that cannot keep packed sequences apart by a mask and positions."""
    name, attention = type(model).__name__, model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"packing needs attention by 'sdpa' or 'eager', {name} was loaded with {attention!r}")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"packing needs positions that restart, and {name} takes no position_ids: leave out --packing")


def _prefix_mask(attention_mask: Tensor, prefix_lengths: Tensor) -> Tensor:
    """(B, 1, N, N) bool: token j is seen by token i if j <= i or j lies in the prefix; padding sees itself."""
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    seen = (position <= position[:, None]) | (position < prefix_lengths[:, None, None])
    token = attention_mask.bool()
    allowed = seen & token[:, None, :] & token[:, :, None]
    return (allowed | (position == position[:, None])).unsqueeze(1)


def _masks_by_layer(model: PreTrainedModel, allowed: Tensor, causal: bool) -> Any:
    """`allowed` as the model's layers take it: a dict where some of them see a window only."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is None or not (kinds == set() or "sliding_attention" in kinds):
        return _as_attended(model, allowed)
    position = torch.arange(allowed.shape[-1], device=allowed.device)
    distance = position[:, None] - position
    near = _as_attended(model, allowed & (distance < window if causal else distance.abs() <= window))
    return {"full_attention": _as_attended(model, allowed), "sliding_attention": near} if kinds else near


def _as_attended(model: PreTrainedModel, allowed: Tensor) -> Tensor:
    """Bool for SDPA, added to the scores by eager attention."""
    if model.config._attn_implementation != "eager":
        return allowed
    return torch.zeros_like(allowed, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)
