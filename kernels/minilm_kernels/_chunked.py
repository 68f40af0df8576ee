"""The loss in plain PyTorch, one block of rows at a time: memory linear in N on any device.

For a block of rows: t = scale_T x_T Y_Tᵀ, P = softmax(t), likewise s and Q for the student, and

    row loss  Σ_j P_ij (log P_ij − log Q_ij)
    G = Q − P,   dX = scale_S G Y_S,   dY += scale_S Gᵀ X_S         (row weights multiply G)
Where the row weight is equal along a sequence it may be applied at the end, to the rows of dX and dY: then
the gradients of unit weight are computed here in the forward, and the backward only scales them.

B batch, R relation heads, N tokens, d dimension of a relation head, W width of the window of keys that a block may see.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17  # scores in a block: four float32 buffers of it fit in a core's second-level cache


def allocate_forward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    scale_t: float,
    scale_s: float,
    needs_gradient: bool,
    prepare: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows (B, R, N), no lse, and the gradients of unit weight if they are prepared."""
    wide = _wide(x_s)
    rows = x_s.new_empty(x_s.shape[:3], dtype=wide)
    dx = torch.empty_like(x_s, dtype=wide) if prepare else rows.new_empty(0)
    dy = torch.empty_like(y_s, dtype=wide) if prepare and y_s is not None else rows.new_empty(0)
    return rows, rows.new_empty(0), rows.new_empty(0), dx, dy


def forward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    scale_t: float,
    scale_s: float,
    needs_gradient: bool,
    prepare: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fills what `allocate_forward` makes."""
    outputs = allocate_forward(x_t, y_t, x_s, y_s, bounds, holes, scale_t, scale_s, needs_gradient, prepare)
    rows, _, _, dx, dy = outputs
    gradients = (dx, dy if y_s is not None else dx) if prepare else None
    _sweep(x_t, y_t, x_s, y_s, bounds, holes, scale_t, scale_s, rows, gradients, None)
    return outputs


def allocate_backward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    lse_t: Tensor,
    lse_s: Tensor,
    dx: Tensor,
    dy: Tensor,
    weight: Tensor,
    scale_t: float,
    scale_s: float,
    along_sequence: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_s), x_s.new_empty(0) if y_s is None else torch.empty_like(y_s)


def backward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    lse_t: Tensor,
    lse_s: Tensor,
    dx: Tensor,
    dy: Tensor,
    weight: Tensor,  # (B, R, N)
    scale_t: float,
    scale_s: float,
    along_sequence: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ weight · row loss; for a self relation the first is the whole gradient."""
    if not along_sequence:
        dx = torch.empty_like(x_s, dtype=_wide(x_s))
        dy = dx if y_s is None else torch.empty_like(y_s, dtype=_wide(x_s))
        _sweep(x_t, y_t, x_s, y_s, bounds, holes, scale_t, scale_s, None, (dx, dy), weight)
        return dx.to(x_s.dtype), x_s.new_empty(0) if y_s is None else dy.to(x_s.dtype)
    weight = weight.unsqueeze(3)
    return (dx * weight).to(x_s.dtype), x_s.new_empty(0) if y_s is None else (dy * weight).to(x_s.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sweep(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    scale_t: float,
    scale_s: float,
    rows: Tensor | None,
    gradients: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
) -> None:
    """Fills rows, and the gradients of Σ weight · row loss (weight None: 1), block by block."""
    y_t, y_s = x_t if y_t is None else y_t, x_s if y_s is None else y_s
    for output in (rows, *(gradients or ())):
        if output is not None:
            output.zero_()
    with torch.autocast(x_s.device.type, enabled=False):
        for batch, heads, row, key in _blocks(bounds, x_s):
            at_rows, at_keys = (batch, heads, row), (batch, heads, key)
            denied, is_row, is_key = _denied(bounds, holes, batch, row, key)
            x, y = _tokens(x_s[at_rows], is_row), _tokens(y_s[at_keys], is_key)
            log_p, p = _softmax(_tokens(x_t[at_rows], is_row), _tokens(y_t[at_keys], is_key), scale_t, denied)
            log_q, q = _softmax(x, y, scale_s, denied)
            if rows is not None:
                difference = log_p.sub_(log_q)
                if denied is not None:
                    difference.masked_fill_(denied, 0)
                rows[at_rows] = _only(torch.linalg.vecdot(p, difference).unsqueeze(3), is_row).squeeze(3)
            if gradients is not None:
                g = q.sub_(p)
                if weight is not None:
                    g.mul_(weight[at_rows].unsqueeze(3))
                g = _only(g, is_row)
                gradients[0][at_rows] += (g @ y).mul_(scale_s)
                gradients[1][at_keys] += (g.mT @ x).mul_(scale_s)


def _blocks(bounds: Tensor | None, x: Tensor) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Blocks (batch, heads, rows, keys) of at most about BLOCK_ELEMENTS scores that cover every allowed pair.

    On the CPU the intervals are read, and blocks leave out what no row may see; elsewhere that would wait for the device.
    """
    batch_size, heads, length, _ = x.shape
    readable = bounds is not None and bounds.device.type == "cpu"
    rows = min(length, max(16, BLOCK_ELEMENTS // length))
    head_step = min(heads, max(1, BLOCK_ELEMENTS // (rows * length)))
    batch_step = min(batch_size, max(1, BLOCK_ELEMENTS // (heads * rows * length))) if head_step == heads else 1
    for b in range(0, batch_size, batch_step):
        batch = slice(b, min(b + batch_step, batch_size))
        for n in range(0, length, rows):
            row, key = slice(n, min(n + rows, length)), slice(0, length)
            if readable and bounds is not None:
                first, end = bounds[0, batch, row], bounds[1, batch, row]
                last = int(end.max())
                if last == 0:
                    continue
                key = slice(int(torch.where(end > first, first, length).min()), last)
            for h in range(0, heads, head_step):
                yield batch, slice(h, min(h + head_step, heads)), row, key


def _denied(
    bounds: Tensor | None, holes: Tensor | None, batch: slice, row: slice, key: slice
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pairs that are not allowed (B, 1, rows, W), None if all are; which rows and keys are tokens (B, 1, ·, 1).

    A row that is no token is denied nothing, so that its softmax exists; it is dropped afterwards.
    """
    if bounds is None:
        return None, None, None
    first, end = bounds[0, batch, row], bounds[1, batch, row]
    is_row = (first < end)[:, None, :, None]
    is_key = (bounds[2, batch, key] < bounds[3, batch, key])[:, None, :, None]
    position = torch.arange(key.start, key.stop, device=bounds.device)
    inside = (position >= first[:, None, :, None]) & (position < end[:, None, :, None]) & is_key.mT
    return (~inside).logical_and_(is_row), is_row, is_key


def _tokens(x: Tensor, token: Tensor | None) -> Tensor:
    """In float32 or wider, zeros where there is no token, whatever stands there."""
    x = x.to(_wide(x))
    return x if token is None else torch.where(token, x, 0)


def _only(x: Tensor, token: Tensor | None) -> Tensor:
    return x if token is None else x.mul_(token)


def _softmax(x: Tensor, y: Tensor, scale: float, denied: Tensor | None) -> tuple[Tensor, Tensor]:
    """log softmax and softmax of scale · x yᵀ over the allowed keys."""
    scores = (x * scale) @ y.mT
    if denied is not None:
        scores.masked_fill_(denied, -torch.inf)
    log_p = torch.log_softmax(scores, dim=-1)
    return log_p, torch.exp(log_p)
