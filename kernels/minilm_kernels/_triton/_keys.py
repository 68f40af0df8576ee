"""Sweep over the rows that see a block of keys: dY, and the last factor of dX.

    G_ij = Q_ij − P_ij,   dY_j = scale_S Σ_i w_i G_ij x_S,i
    dX_i is there, up to the gradient of the loss or the row weights; a self relation has dX + dY as its gradient
REDUCES: w is equal along a sequence and leaves the sum (inside it would push a float16 G below its smallest number).
Otherwise each row has a weight of any sign, given relative to the largest, `unit`.

G relations, B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S padded.
"""

from collections.abc import Sequence
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._launch import Launch, Schedule, group, row_gradients, shared_arguments
from minilm_kernels._triton._plan import Problem, Tiles, sweep_grid
from minilm_kernels._triton._steps import (
    head_pointer,
    is_token,
    load,
    load_lse,
    load_tokens,
    pick,
    probability,
    program,
    scores,
    store_tokens,
    visible_range,
    weight_of,
)


@triton.jit
def key_sweep(
    x_t,  # ((pointers), strides) of G tensors (B, R, N, D_T)
    y_t,
    x_s,  # of G tensors (B, R, N, D_S)
    y_s,
    bounds,  # (4, B, N) or None
    holes,  # (B,) or None
    row_weight,  # (pointer, strides) of (B, N), or None
    lse_t,  # as row_sweep stores it
    lse_s,
    grad,  # REDUCES: gradient of the weighted sum; else gradients of the rows over unit, (G, B, R, N)
    unit,  # REDUCES: None; else one number
    relation_weights,
    dx,  # of G tensors (B, R, N, D_S), changed in place
    dy,  # None for self relations
    scales,  # scale_t log2 e, scale_s log2 e, scale_s, weight
    B,
    R,
    N,
    REDUCES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    D_T: tl.constexpr,
    D_S: tl.constexpr,
    DIM_T: tl.constexpr,
    DIM_S: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FILLED: tl.constexpr,  # whether N fills a tile of the main loop
    TAIL: tl.constexpr,  # rows of a tile where some do not see all keys
):
    tile, head, batch, relation = program(tl.cdiv(N, BLOCK_N), R, B)
    n = tile * BLOCK_N
    inside = n + tl.arange(0, BLOCK_N) < N
    token, first, end, start, full, last = visible_range(bounds, holes, 2, batch, n, B, N, FILLED, BLOCK_N, BLOCK_M)
    key_t = load_tokens(y_t, head_pointer(y_t, relation, batch, head), n, token, D_T, DIM_T, BLOCK_N)
    key_s = load_tokens(y_s, head_pointer(y_s, relation, batch, head), n, token, D_S, DIM_S, BLOCK_N)
    row_t, row_s = head_pointer(x_t, relation, batch, head), head_pointer(x_s, relation, batch, head)
    at = ((relation * B + batch) * R + head).to(tl.int64) * N
    sums = tl.zeros([BLOCK_N, DIM_S], tl.float32)

    for m in range(start, full, BLOCK_M):
        t, s, tile_s = scores(
            key_t, key_s, token, y_t, y_s, x_t, x_s, row_t, row_s, m, None, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        at_m = at + (m + tl.arange(0, BLOCK_M))
        sums = _add_rows(sums, t, s, tile_s, lse_t, lse_s, grad, scales, at_m, None, REDUCES, PRECISION)
    for m in range(full, last, TAIL):
        row = is_token(bounds, holes, batch, m, last, B, N, TAIL)
        t, s, tile_s = scores(
            key_t, key_s, token, y_t, y_s, x_t, x_s, row_t, row_s, m, row, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_N, TAIL,
        )  # fmt: skip
        at_m = at + (m + tl.arange(0, TAIL))
        sums = _add_rows(sums, t, s, tile_s, lse_t, lse_s, grad, scales, at_m, row, REDUCES, PRECISION)

    sums *= scales[2]
    weight = weight_of(row_weight, scales[3], batch, n, inside, BLOCK_N)
    if REDUCES:
        factor = tl.load(grad) * pick(relation_weights, relation)
        sums *= (weight * factor)[:, None]
        own = tl.full([BLOCK_N], 1.0, tl.float32) * factor if WEIGHTED else weight * factor
    else:
        sums *= tl.load(unit)
        own = tl.load(grad + at + n + tl.arange(0, BLOCK_N), mask=token, other=0.0) * tl.load(unit)
    gradient_pointer = head_pointer(dx, relation, batch, head)
    gradient = load_tokens(dx, gradient_pointer, n, token, D_S, DIM_S, BLOCK_N).to(tl.float32) * own[:, None]
    if dy is None:
        gradient += sums
    else:
        sums = tl.where(token[:, None], sums, 0.0)
        store_tokens(dy, head_pointer(dy, relation, batch, head), n, sums, inside, D_S, DIM_S, BLOCK_N)
    gradient = tl.where(token[:, None], gradient, 0.0)
    store_tokens(dx, gradient_pointer, n, gradient, inside, D_S, DIM_S, BLOCK_N)


@triton.jit
def _add_rows(sums, t, s, tile_s, lse_t, lse_s, grad, scales, at, row, REDUCES: tl.constexpr, PRECISION: tl.constexpr):
    """The sums after one more tile of products; row is None where all keys see all rows of the tile."""
    g = probability(s, scales[1], load_lse(lse_s, at, row), 0)
    g -= probability(t, scales[0], load_lse(lse_t, at, row), 0)
    if not REDUCES:
        g *= load(grad + at, row)[None, :]
    return tl.dot(g.to(tile_s.dtype), tile_s, sums, input_precision=PRECISION)


def key_launch(
    relations: Relations,
    problem: Problem,
    lse_t: Sequence[Tensor],
    lse_s: Sequence[Tensor],
    grad: Tensor,
    dx: list[Tensor],
    dy: list[Tensor],
    shape: Tiles,
) -> Launch:
    grad, unit = row_gradients(problem, grad)
    operands = {
        **shared_arguments(relations, completes=True),
        "y_t": group(relations.keys_t),
        "y_s": group(relations.keys_s),
        "holes": relations.holes,
        "lse_t": tuple(lse_t),
        "lse_s": tuple(lse_s),
        "grad": grad,
        "unit": unit,
        "relation_weights": tuple(relations.relation_weights),
        "dx": group(dx),
        "dy": group(dy),
    }
    return Launch(_schedule(problem, shape), operands)


@lru_cache(maxsize=1024)
def _schedule(problem: Problem, shape: Tiles) -> Schedule:
    block_m, block_n = shape[:2]
    programs, constants = sweep_grid(problem, block_n, block_m)
    constants = constants | {
        "REDUCES": problem.reduces,
        "WEIGHTED": problem.weights_in_gradients,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return Schedule(key_sweep, programs, constants, *shape[2:])
