"""The loss in plain PyTorch, one block of rows at a time: memory linear in N on any device.

For a block of rows: t = scale_T x_T Y_Tᵀ, less the largest of its row, e_T = exp(t), Z_T = Σ_j e_T, likewise for the
student, and

    row loss  Σ_j e_T (t − s) / Z_T − log(Z_T / Z_S)        (relative to the largest scores: the lse would cancel)
    G = Q − P = (e_S − e_T Z_S / Z_T) / Z_S,   dX = scale_S G Y_S,   dY += scale_S Gᵀ X_S     (row weights multiply G)
What multiplies whole rows of G, 1/Z_S and the row weights, is applied to dX and to X_S, which are narrower.
Where the row weight is equal along a sequence it may be applied at the end, to the rows of dX and dY: then
the gradients of unit weight are computed here in the forward, and the backward only scales them.

B batch, R relation heads, N tokens, d dimension of a relation head, W width of the window of keys that a block may see.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minilm_kernels._relations import Outputs, Relations

MIN_ROWS = 64  # of a block, where packed sequences are shorter
BLOCK_ELEMENTS = 1 << 18  # scores in a block: the fastest of 2^16 to 2^19 on two CPU cores


def allocate(relations: Relations, needs_gradient: bool) -> Outputs:
    """What `forward` returns, uninitialised: no lse, and all gradients where the row weights are known."""
    value = relations.value()
    if not (needs_gradient and relations.reduces):
        return value, [], [], [], []
    dx, dy = ([torch.empty_like(x) for x in xs] for xs in (relations.x_s, relations.y_s))
    return value, [], [], dx, dy


def forward(relations: Relations, needs_gradient: bool) -> Outputs:
    outputs = allocate(relations, needs_gradient)
    value, _, _, dx, dy = outputs
    row_weight, (scale, _) = _row_weight(relations), relations.gradient_scales
    for i in range(len(relations.x_s)):
        rows, gradients = _sweep(relations, i, True, bool(dx), None, scale)
        value[i] = (rows * row_weight).sum() if relations.reduces else rows
        for prepared, gradient in zip((dx, dy), gradients, strict=False):
            prepared[i].copy_(gradient * row_weight.unsqueeze(3) if relations.weights_in_gradients else gradient)
    return outputs


def backward(
    relations: Relations,
    lse_t: list[Tensor],  # none
    lse_s: list[Tensor],
    grad: Tensor,  # () where `reduces`, else (relations, B, R, N)
    dx: list[Tensor],
    dy: list[Tensor],
) -> None:
    """Completes dx and dy in place."""
    for i, relation_weight in enumerate(relations.relation_weights):
        of_relation = [gradients[i] for gradients in (dx, dy) if gradients]
        if not relations.reduces:
            for output, gradient in zip(
                of_relation, _sweep(relations, i, False, True, grad[i], relations.scale_s)[1], strict=True
            ):
                output.copy_(gradient)
            continue
        factor = grad * relation_weight
        if not relations.weights_in_gradients:
            factor = (factor * relations.gradient_scales[1] * _row_weight(relations)).unsqueeze(3)
        for prepared in of_relation:
            prepared.copy_(prepared * factor)


def _row_weight(relations: Relations) -> Tensor:
    """The weight of each row, (B or 1, 1, N or 1)."""
    if relations.row_weight is None:
        return relations.x_s[0].new_full((1, 1, 1), relations.weight, dtype=relations.wide)
    return relations.row_weight.unsqueeze(1) * relations.weight


def _sweep(
    relations: Relations, i: int, with_rows: bool, with_gradients: bool, weight: Tensor | None, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows (B, R, N) of relation i, and the gradients (dX, dY) of Σ weight · row loss (weight None: 1), block by block.

    The gradients have the factor `scale` in place of scale_S.
    For a self relation there is one gradient, of both sides together. What is not asked for is empty.
    """
    x_t, x_s, y_t, y_s = relations.x_t[i], relations.x_s[i], relations.keys_t[i], relations.keys_s[i]
    bounds, holes, wide = relations.bounds, relations.holes, relations.wide
    rows = x_s.new_zeros(x_s.shape[:3] if with_rows else (0,), dtype=wide)
    sides = (x_s,) if relations.is_self else (x_s, y_s)
    gradients = tuple(x_s.new_zeros(x.shape, dtype=wide) for x in sides) if with_gradients else ()
    scratch = _Scratch(x_s, wide)
    with torch.autocast(x_s.device.type, enabled=False):
        for batch, heads, row, key in _blocks(bounds, x_s):
            at_rows, at_keys = (batch, heads, row), (batch, heads, key)
            denied, is_row, is_key = _denied(bounds, holes, batch, row, key)
            x, y = _tokens(x_s[at_rows], is_row, wide), _tokens(y_s[at_keys], is_key, wide)
            teacher = _tokens(x_t[at_rows], is_row, wide), _tokens(y_t[at_keys], is_key, wide)
            t = _scores(*teacher, relations.scale_t, denied, scratch)
            s = _scores(x, y, relations.scale_s, denied, scratch)
            for scores in (t, s):
                scores.sub_(scores.amax(3, keepdim=True))
            e_t = torch.exp(t, out=scratch.like(t))
            if with_rows:
                difference = t.sub_(s)
                if denied is not None:
                    difference.masked_fill_(denied, 0)
            e_s = s.exp_()
            z_t, z_s = e_t.sum(3, keepdim=True), e_s.sum(3, keepdim=True)
            if with_rows:
                loss = difference.mul_(e_t).sum(3, keepdim=True).div_(z_t).sub_((z_t / z_s).log_())
                rows[at_rows] = _only(loss, is_row).squeeze(3)
            if with_gradients:
                g = e_s.addcmul_(e_t, z_s / z_t, value=-1).flatten(0, 1)
                factor = _only(z_s.reciprocal_().mul_(scale), is_row)
                if weight is not None:
                    factor.mul_(weight[at_rows].unsqueeze(3))
                _add_rows(gradients[0][at_rows], g, y, factor)
                _add_keys(gradients[-1][at_keys], g, x * factor)
            scratch.reuse()
    return rows, gradients


class _Scratch:
    """Buffers of a block, kept for the next: fresh ones of a megabyte cost more in page faults than what fills them."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._new = like.new_empty(0, dtype=dtype)
        self._free: list[Tensor] = []
        self._used: list[Tensor] = []

    def like(self, x: Tensor) -> Tensor:
        return self(tuple(x.shape))

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        buffer = self._free.pop() if self._free else self._new
        if buffer.numel() < size:
            buffer = self._new.new_empty(size)
        self._used.append(buffer)
        return buffer[:size].view(shape)

    def reuse(self) -> None:
        """Everything handed out is free again."""
        self._free += self._used
        self._used = []


def _blocks(bounds: Tensor | None, x: Tensor) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Blocks (batch, heads, rows, keys) of at most about BLOCK_ELEMENTS scores that cover every allowed pair.

    On the CPU the intervals are read: blocks leave out what no row may see, and end where a packed sequence ends.
    Elsewhere that would synchronise.
    """
    batch_size, heads, length, _ = x.shape
    readable = bounds is not None and bounds.device.type == "cpu"
    rows = min(length, max(16, BLOCK_ELEMENTS // length))
    batch_step = min(batch_size, max(1, BLOCK_ELEMENTS // (heads * rows * length)))
    for b in range(0, batch_size, batch_step):
        batch = slice(b, min(b + batch_step, batch_size))
        n, stop = (0, length) if not readable else _extent(bounds, batch, slice(0, length), 2)
        while n < stop:
            row = slice(n, min(n + rows, stop) if not readable else _end_of_rows(bounds, batch, n, min(n + rows, stop)))
            key = slice(0, length) if not readable else slice(*_extent(bounds, batch, row, 0))
            n = row.stop
            if key.stop == 0:  # a hole in the mask covers the block
                continue
            scores = batch_step * (row.stop - row.start) * (key.stop - key.start)
            head_step = -(-heads // -(-heads * scores // BLOCK_ELEMENTS))  # equal shares
            for h in range(0, heads, head_step):
                yield batch, slice(h, min(h + head_step, heads)), row, key


def _end_of_rows(bounds: Tensor | None, batch: slice, start: int, stop: int) -> int:
    """The first end of a packed sequence behind at least MIN_ROWS rows, or `stop`."""
    assert bounds is not None
    end = start
    while end < min(start + MIN_ROWS, stop):
        end = max(end + 1, int(bounds[3, batch, end].max()))  # behind the last row that sees this key
    return min(end, stop)


def _extent(bounds: Tensor | None, batch: slice, tokens: slice, which: int) -> tuple[int, int]:
    """First and end of what some of the tokens may see; which: 0 keys of rows, 2 rows of keys. (0, 0) if nothing."""
    assert bounds is not None
    first, end = bounds[which, batch, tokens], bounds[which + 1, batch, tokens]
    stop = int(end.max())
    return (int(torch.where(end > first, first, stop).min()), stop) if stop else (0, 0)


def _denied(
    bounds: Tensor | None, holes: Tensor | None, batch: slice, row: slice, key: slice
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pairs that are not allowed (B, 1, rows, W), None if all are; which rows and keys are tokens (B, 1, ·, 1).

    A row that is no token is denied nothing, so that its softmax exists; it is dropped afterwards.
    """
    if bounds is None:
        return None, None, None
    first, end = bounds[0, batch, row], bounds[1, batch, row]
    full = (first == key.start) & (end == key.stop) & ((holes is None) or (holes[batch, None] == 0))
    if bounds.device.type == "cpu" and bool(full.all()):
        return None, None, None
    is_row = (first < end)[:, None, :, None]
    is_key = (bounds[2, batch, key] < bounds[3, batch, key])[:, None, :, None]
    position = torch.arange(key.start, key.stop, device=bounds.device)
    inside = (position >= first[:, None, :, None]) & (position < end[:, None, :, None]) & is_key.mT
    return (~inside).logical_and_(is_row), is_row, is_key


def _tokens(x: Tensor, token: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, with zeros where there is no token, whatever stands there."""
    x = x.to(dtype)
    return x if token is None else torch.where(token, x, 0)


def _only(x: Tensor, token: Tensor | None) -> Tensor:
    return x if token is None else x.mul_(token)


def _scores(x: Tensor, y: Tensor, scale: float, denied: Tensor | None, scratch: _Scratch) -> Tensor:
    """scale · x yᵀ, −∞ where it is not allowed, in scratch memory."""
    scores = scratch((*x.shape[:3], y.shape[2]))
    product = scores.flatten(0, 1)
    torch.baddbmm(product, x.flatten(0, 1), y.flatten(0, 1).mT, beta=0, alpha=scale, out=product)
    return scores if denied is None else scores.masked_fill_(denied, -torch.inf)


def _add_rows(total: Tensor, g: Tensor, y: Tensor, factor: Tensor) -> None:
    """total (B, R, rows, d) += factor · g y."""
    total.addcmul_(torch.bmm(g, y.flatten(0, 1)).view_as(total), factor)


def _add_keys(total: Tensor, g: Tensor, x: Tensor) -> None:
    """total += gᵀ x, in place; total (B, R, W, d) is of adjacent sequences and heads."""
    total.view(-1, *total.shape[2:]).baddbmm_(g.mT, x.flatten(0, 1))
