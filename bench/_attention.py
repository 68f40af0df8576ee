"""The loss out of attention kernels, whose outputs and logsumexp hold all of it:

    KL_i = scale_T x_T·O_TT − scale_S x_S·O_TS − lse_T + lse_S

O_TT and O_TS are what the teacher's attention makes of its own and of the student's values, in one call over both.
B batch, R relation heads, N tokens, d dimension of a relation head, as in `_cases`.
"""

import math
from collections.abc import Callable

import torch
from _cases import Case, Triple
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]  # query, key, value, scale -> output, lse


def attention_loss(
    case: Case, attend: Attend, lse: Callable[[Tensor, Tensor, float], Tensor]
) -> Callable[[Triple, Triple, Tensor | None], Tensor]:
    """The loss of (teacher, student, mask), the mask being the one that `attend` knows.

    Args:
        attend: for the teacher, where nothing is differentiated but the values.
        lse: of query, key and scale, with a gradient for both.
    """
    sides, lengths, rows_of_all = case.sides, case.lengths, case.batch * case.heads
    scale_t, scale_s = 1 / math.sqrt(case.d_t), 1 / math.sqrt(case.d_s)

    def rows(x_t: Tensor, y_t: Tensor, x_s: Tensor, y_s: Tensor) -> Tensor:
        o_t, lse_t = attend(x_t, y_t, torch.cat([y_t, y_s], -1), scale_t)
        o_tt, o_ts = o_t.split([y_t.shape[-1], y_s.shape[-1]], -1)
        return scale_t * _dot(x_t, o_tt) - scale_s * _dot(x_s, o_ts) - lse_t + lse(x_s, y_s, scale_s)

    def loss(teacher: Triple, student: Triple, mask: Tensor | None) -> Tensor:
        losses = torch.stack([rows(teacher[x], teacher[y], student[x], student[y]) for x, y in sides]).sum(0)
        if mask is None:
            return losses.mean()
        weights = mask / (rows_of_all * torch.tensor(lengths, device=mask.device)[:, None])
        return (losses.masked_fill(~mask.bool()[:, None], 0) * weights[:, None]).sum()

    return loss


def carried_lse(x: Tensor, y: Tensor, scale: float, attend: Attend) -> Tensor:
    """The logsumexp of an attention that gives it no gradient.

    That is scale (Q Y) for x and scale (Qᵀ X) for y: of this product with the attention's query and key held constant,
    whose value is taken away again.
    """
    output, lse = attend(x.detach(), y.detach(), y, scale)
    carrier = scale * (_dot(x, output.detach()) + _dot(x.detach(), output))
    return lse + carrier - carrier.detach()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(x.float(), y.float())
    return products


def attend_by_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output (B, R, N, d of value) and natural logsumexp (B, R, N) of flash attention."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    if not query.is_cuda:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # It wants one head dimension for all three, a multiple of 8: zeros change neither scores nor outputs.
    width = value.shape[-1]
    dim = -(-max(query.shape[-1], width) // 8) * 8
    query, key, value = (F.pad(x, (0, dim - x.shape[-1])) for x in (query, key, value))
    output, lse = kernel(query, key, value, 0.0, causal, scale=scale)[:2]
    return output[..., :width], lse


def attend_by_flex(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: BlockMask | None
) -> tuple[Tensor, Tensor]:
    """The same of FlexAttention, which wants head dimensions of at least 16."""
    width = value.shape[-1]
    query, key, value = (F.pad(x, (0, max(0, 16 - x.shape[-1]))) for x in (query, key, value))
    output, lse = flex_attention(query, key, value, scale=scale, block_mask=mask, return_lse=True)
    return output[..., :width], lse


def flex_mask(case: Case, device: str) -> BlockMask | None:
    """Which keys a row may see, by blocks; None where it is all of them. Rows of padding see none."""
    if not (case.padded or case.causal):
        return None
    lengths = torch.tensor(case.lengths, device=device)

    def allowed(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        inside = (row < lengths[b]) & (key < lengths[b])
        return inside & (key <= row) if case.causal else inside

    return create_block_mask(allowed, case.batch, None, case.n, case.n, device=device)
