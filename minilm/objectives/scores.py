"""Mean squared error of attention scores before the softmax (TinyBERT, eq. 7), without a matrix of scores.

    part_m = mean over sequences of  1 / (H n²) · Σ over heads and pairs of tokens (s_T - s_S)²,   s = q kᵀ / √D
With A = [q_T / √D_T, -q_S / √D_S] and B = [k_T, k_S] side by side, A Bᵀ = s_T - s_S, and so
    Σ (s_T - s_S)² = ⟨AᵀA, BᵀB⟩,   d/dA = 2 A (BᵀB),   d/dB = 2 B (AᵀA)
whose matrices are D_T + D_S wide: time and memory are linear in n. All sums are float64, because they cancel where the
models are close.

B batch, H heads, N places, n real tokens among them, D head dimension.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minilm.errors import UsageError
from minilm.models.batches import Batch, count_sequences, relation_qkv, token_mask
from minilm.models.observe import Needs, Observed
from minilm.objectives.term import Term, Unit

QK = tuple[Tensor, Tensor]
CHUNK_ELEMENTS = {"cuda": 1 << 24, "cpu": 1 << 20}  # of A, and of B, at a time: 128 and 8 MiB


class ScoresMSE(Term):
    """Part "scores_m" for the student's layer m, each with weight 1.

    Args:
        layers: the student's layers, each with the teacher's, 1 to L or -1 to -L.

    Raises:
        ValueError: no layers; from the forward, numbers of heads that differ.
    """

    unit: Unit = "sequences"

    def __init__(self, layers: Mapping[int, int]) -> None:
        super().__init__()
        if not layers:
            raise UsageError(f"layers is {layers!r}: name at least one of the student's and one of the teacher's")
        self.layers = dict(layers)
        self.parts = {f"scores_{layer}": 1.0 for layer in layers}
        self.teacher = Needs(qkv=tuple(dict.fromkeys(layers.values())))
        self.student = Needs(qkv=tuple(layers))

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        count = count_sequences(batch).clamp(min=1)
        packed = batch["cu_seqlens"].diff().tolist() if "cu_seqlens" in batch else None  # waits for the device
        parts = {}
        for layer, of_teacher in self.layers.items():
            (q_t, k_t, _), (q_s, k_s, _) = (
                relation_qkv(qkv, batch) for qkv in (teacher.qkv[of_teacher], student.qkv[layer])
            )
            if packed is None:
                means = scores_mse((q_t, k_t), (q_s, k_s), token_mask(batch))
            else:
                q_t, k_t, q_s, k_s = (_unpacked(x, packed) for x in (q_t, k_t, q_s, k_s))
                means = scores_mse((q_t, k_t), (q_s, k_s), _unpacked_mask(packed, q_s))
            parts[f"scores_{layer}"] = means.sum() / count
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}


def scores_mse(teacher: QK, student: QK, attention_mask: Tensor | None = None) -> Tensor:
    """The mean over a sequence's heads and pairs of real tokens, (B,) float32 (float64 of float64); 0 without tokens.

    Gradients flow to the student only, first derivatives only. What stands behind the mask changes nothing.

    Args:
        teacher, student: q (B, H, N, D) and k (B, H_kv, N, D), whose heads are repeated as attention does.
        attention_mask: (B, N), nonzero = token.

    Raises:
        ValueError: numbers of heads that differ.
    """
    (q_t, k_t), (q_s, k_s) = teacher, student
    if q_t.shape[1] != q_s.shape[1]:
        raise UsageError(
            f"the teacher has {q_t.shape[1]} heads and the student {q_s.shape[1]}: scores are compared head by head, "
            "so give both the same number"
        )
    k_t, k_s = (k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for q, k in ((q_t, k_t), (q_s, k_s)))
    if not torch.is_grad_enabled():  # of which a Function's forward is not told
        q_s, k_s = q_s.detach(), k_s.detach()
    token = q_s.new_ones(q_s.shape[0], q_s.shape[2]) if attention_mask is None else attention_mask
    means: Tensor = _ScoresMSE.apply(q_s, k_s, q_t, k_t, token != 0)  # type: ignore[no-untyped-call]
    return means


class _ScoresMSE(torch.autograd.Function):
    """The gradients are made in the forward, some heads at a time: neither A nor B is ever there as a whole."""

    @staticmethod
    def forward(ctx: Any, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, token: Tensor) -> Tensor:
        batch, heads, places, dim_s = q_s.shape
        dim_t = q_t.shape[-1]
        wide = torch.promote_types(q_s.dtype, torch.float32)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dq, dk = (torch.empty(x.shape if needed else (0,), dtype=wide, device=x.device) for x in (q_s, k_s))
        sums = torch.empty(batch, heads, dtype=torch.float64, device=q_s.device)
        share = 1 / (heads * token.sum(1).clamp(min=1).double().square())  # (B,), of a part in the sum over pairs
        at_once = CHUNK_ELEMENTS.get(q_s.device.type, CHUNK_ELEMENTS["cuda"]) // (places * (dim_t + dim_s))
        heads_at_once = max(1, min(heads, at_once))
        rows_at_once = max(1, at_once // heads)
        for row, head in product(range(0, batch, rows_at_once), range(0, heads, heads_at_once)):
            rows = slice(row, row + rows_at_once)
            some = rows, slice(head, head + heads_at_once)
            a = _side_by_side(q_t[some], q_s[some], token[rows], (dim_t**-0.5, -(dim_s**-0.5)))
            b = _side_by_side(k_t[some], k_s[some], token[rows], (1.0, 1.0))
            gram_a, gram_b = a.mT @ a, b.mT @ b
            sums[some] = (gram_a * gram_b).sum((-2, -1))
            if needed:
                twice = 2 * share[rows, None, None, None]
                dq[some] = a @ gram_b[..., dim_t:] * twice * -(dim_s**-0.5)
                dk[some] = b @ gram_a[..., dim_t:] * twice
        ctx.save_for_backward(dq, dk)
        ctx.dtypes = q_s.dtype, k_s.dtype
        return (sums.sum(1).clamp(min=0) * share).to(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("scores_mse has first derivatives only: call backward without create_graph")
        dq, dk = (
            (x * grad[:, None, None, None]).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return dq, dk, None, None, None


def _side_by_side(teacher: Tensor, student: Tensor, token: Tensor, scales: tuple[float, float]) -> Tensor:
    """(B, H, N, D_T + D_S) float64, 0 at padding."""
    both = torch.cat([x.double() * scale for x, scale in zip((teacher, student), scales, strict=True)], dim=-1)
    return both.masked_fill_(~token[:, None, :, None], 0)


def _unpacked(x: Tensor, lengths: list[int]) -> Tensor:
    """(S, H, n, D), a packed row's S sequences one by one, of its tokens (1, H, T, D)."""
    return pad_sequence(x[0].transpose(0, 1).split(lengths), batch_first=True).transpose(1, 2)


def _unpacked_mask(lengths: list[int], like: Tensor) -> Tensor:
    place = torch.arange(like.shape[2], device=like.device)
    return place < torch.tensor(lengths, device=like.device)[:, None]
