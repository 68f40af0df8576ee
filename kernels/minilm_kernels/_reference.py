"""The formula, with every N×N matrix in memory: it defines correctness and works in any float type.

    P = softmax(scale_T X_T Y_Tᵀ),  Q = softmax(scale_S X_S Y_Sᵀ)   over the allowed keys
    row loss  KL(P_i ‖ Q_i) = Σ_j P_ij (log P_ij − log Q_ij)   in nats     (MiniLM eq. 6 and 9, MiniLMv2 eq. 5 and 6)
scale is 1/(√d τ) by default. B batch, R relation heads, N tokens, d dimension of a relation head, τ temperature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilm_kernels._allowed import Pattern, allowed_matrix
from minilm_kernels._relations import Relations, weighted_total


def reference_rows(
    x_t: Tensor,  # (B, R, N, d_T)
    y_t: Tensor,  # (B, R, N, d_T)
    x_s: Tensor,  # (B, R, N, d_S)
    y_s: Tensor,  # (B, R, N, d_S)
    pattern: Pattern,
    scale_t: float,
    scale_s: float,
) -> Tensor:
    """Row losses (B, R, N) in nats, 0 for rows that are no token; differentiable any number of times in the student.

    bf16 and fp16 products stay in their type, as eager code has it: fp16 scores beyond 65504, where the kernels are
    right, give NaN here (convert the tensors to float32). Softmax and KL are taken in float32 or wider.

    >>> x = torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float64)
    >>> reference_rows(x, x, x, x, Pattern(), 1.0, 1.0)
    tensor([[[0., 0.]]], dtype=torch.float64)
    """
    batch, _, length, _ = x_t.shape
    allowed = allowed_matrix(pattern, batch, length, x_t.device)
    with torch.autocast(x_s.device.type, enabled=False):
        if allowed is None:
            log_q = _log_softmax((x_s @ y_s.mT) * scale_s)
            log_p = _log_softmax((x_t.detach() @ y_t.detach().mT) * scale_t).to(log_q.dtype)
            return (log_p.exp() * (log_p - log_q)).sum(-1)

        row, key = (seen.unsqueeze(1).unsqueeze(3) for seen in (allowed.any(2), allowed.any(1)))
        allowed = allowed.unsqueeze(1) | ~row  # a row that is no token sees all, so that its softmax exists

        def scores(x: Tensor, y: Tensor, scale: float) -> Tensor:
            product = torch.where(row, x, 0) @ torch.where(key, y, 0).mT
            return (product * scale).masked_fill(~allowed, -torch.inf)

        log_q = _log_softmax(scores(x_s, y_s, scale_s))
        log_p = _log_softmax(scores(x_t.detach(), y_t.detach(), scale_t)).to(log_q.dtype)
        difference = torch.where(allowed, log_p - log_q, 0)
        return (log_p.exp() * difference).sum(-1) * row.squeeze(3)


def _log_softmax(scores: Tensor) -> Tensor:
    return torch.log_softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def reference_losses(relations: Sequence[Relations], pattern: Pattern) -> tuple[Tensor, Tensor]:
    """What `weighted_total` gives; the losses are detached."""
    values = []
    for group in relations:
        sides = zip(group.x_t, group.keys_t, group.x_s, group.keys_s, strict=True)
        rows = torch.stack([reference_rows(*x, pattern, group.scale_t, group.scale_s) for x in sides])
        if group.row_weight is not None and group.reduces:
            rows = rows * group.row_weight.unsqueeze(1)
        values.append(rows.sum((1, 2, 3)) * group.weight if group.reduces else rows)
    total, parts = weighted_total(relations, values)
    return total, parts.detach()
