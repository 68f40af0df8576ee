"""Which keys each row may see: a padding mask, causality, prefixes and packing, as one pair of intervals per token.

Key j is allowed for row i when both are tokens of the same sequence and (not causal, or j <= i, or j < prefix length).
Seen from row i the allowed keys lie in one interval, and so do the rows that see key j; only holes in a padding mask
need more, and there "j is a token" is read off its own interval, which is empty for padding.

B batch, N tokens, S packed sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minilm_kernels._relations import Masks


class Pattern(NamedTuple):
    """The allowed keys as the caller names them."""

    attention_mask: Tensor | None = None  # (B, N), nonzero = token
    causal: bool = False
    prefix_lengths: Tensor | None = None  # (B,), with causal
    cu_seqlens: Tensor | None = None  # (S + 1,), B = 1

    @property
    def is_full(self) -> bool:
        """Whether every row sees every key."""
        return self.attention_mask is None and self.cu_seqlens is None and not self.causal


def allowed_matrix(pattern: Pattern, batch: int, length: int, device: torch.device) -> Tensor | None:
    """The definition itself, (B, N, N) bool: whether row i may see key j; None where every row sees every key."""
    if pattern.is_full:
        return None
    position = torch.arange(length, device=device)
    allowed = torch.ones((batch, length, length), dtype=torch.bool, device=device)
    if pattern.attention_mask is not None:
        token = pattern.attention_mask != 0
        allowed = token.unsqueeze(2) & token.unsqueeze(1)
    if pattern.cu_seqlens is not None:
        edges = pattern.cu_seqlens.to(torch.int64)
        sequence = (position.unsqueeze(1) >= edges[1:]).sum(1)
        token = position < edges[-1]
        allowed = allowed & token & (sequence.unsqueeze(1) == sequence.unsqueeze(0))
    if pattern.causal:
        seen = position.unsqueeze(0) <= position.unsqueeze(1)
        if pattern.prefix_lengths is not None:
            seen = seen | (position < pattern.prefix_lengths.to(torch.int64).view(-1, 1, 1))
        allowed = allowed & seen
    return allowed


def allowed_keys(
    pattern: Pattern, reduction: str, batch: int, length: int, device: torch.device, dtype: torch.dtype
) -> Masks:
    """The bounds and holes of `Relations`, and the weight of each row in the reduction, heads apart, (B, N) in `dtype`.

    "sequence": 1/(tokens of the row's sequence * sequences with tokens); "token": 1/tokens; "sum" and "none": 1.
    All None where every row sees every key; without mask and packing the weights are None, as all rows weigh the same.
    Everything is computed on the device; no value is read back.
    """
    if pattern.is_full:
        return None, None, None
    position = torch.arange(length, device=device)
    first, end = torch.zeros((1, 1), dtype=torch.int64, device=device), torch.full((1, 1), length, device=device)
    token, holes = None, None
    if pattern.attention_mask is not None:
        token = pattern.attention_mask != 0
        tokens = token.sum(1, keepdim=True)
        first = torch.where(token, position, length).amin(1, keepdim=True)
        end = torch.where(token, position + 1, 0).amax(1, keepdim=True)
        holes = (tokens < end - first).squeeze(1).to(torch.int32)
        sequences = (tokens > 0).sum()
    elif pattern.cu_seqlens is not None:
        edges = pattern.cu_seqlens.to(torch.int64).clamp(0, length)
        sequence = torch.searchsorted(edges[1:], position, right=True)
        token = (position < edges[-1]).unsqueeze(0)
        sequence = sequence.clamp(max=len(edges) - 2)
        first, end = edges[sequence].unsqueeze(0), edges[sequence + 1].unsqueeze(0)
        tokens = end - first
        sequences = (edges.diff() > 0).sum()

    weight = None
    if token is not None:
        weight = token.to(dtype)
        if reduction == "sequence":
            weight = weight / (tokens.clamp(min=1) * sequences.clamp(min=1))
        elif reduction == "token":
            weight = weight / token.sum().clamp(min=1)

    key_end, row_first = end, first
    if pattern.causal:
        last_seen = position + 1
        row_first = torch.maximum(first, position)
        if pattern.prefix_lengths is not None:
            prefix = pattern.prefix_lengths.to(torch.int64).view(-1, 1)
            last_seen = torch.maximum(last_seen, prefix)
            row_first = torch.where(position < prefix, first, row_first)
        key_end = torch.minimum(end, last_seen)
    bounds = torch.stack([edge.expand(batch, length) for edge in (first, key_end, row_first, end)])
    if token is not None:
        bounds = bounds * token
    return bounds.to(torch.int32), holes, weight
