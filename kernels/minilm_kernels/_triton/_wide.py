"""Sweep for a gradient of heads too wide to hold: their dimensions are read in parts, and written in parts.

    G_ij = Q_ij − P_ij
    as rows, dX_i = w_i scale_S Σ_j G_ij y_j;   as keys, dY_j = scale_S Σ_i w_i G_ij x_i
The own tokens of a program are rows, or keys, or both: a self relation whose scores are symmetric has
dX_i = w_i scale_S Σ_j (G_ij + G_ji) x_j. Scores accumulate over parts of the dimensions. A program makes OUT dimensions
of the gradient, so the programs of a tile compute its scores as often as it has such parts: the exponentials of that
cost less than the products. The forward prepares no gradient, as two accumulators would halve OUT.
REDUCES: see `_keys`.

G relations, B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S of a part.
"""

from collections.abc import Sequence
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._launch import Launch, Schedule, group, row_gradients, shared_arguments
from minilm_kernels._triton._plan import Problem, Tiles, output_dim, sweep_grid
from minilm_kernels._triton._steps import (
    head_pointer,
    is_token,
    load,
    load_lse,
    load_own_lse,
    load_tokens,
    pick,
    probability,
    program,
    scores,
    store_tokens,
    tokens,
    visible_range,
    weight_of,
)


@triton.jit
def wide_sweep(
    x_t,  # of the own tokens: ((pointers), strides) of G tensors (B, R, N, D_T)
    y_t,  # of the others
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
    gradient,  # of x_s: G tensors (B, R, N, D_S)
    scales,  # scale_t log2 e, scale_s log2 e, scale_s, weight
    B,
    R,
    N,
    AS_ROWS: tl.constexpr,
    AS_KEYS: tl.constexpr,
    ADDS: tl.constexpr,  # whether to what `gradient` holds
    REDUCES: tl.constexpr,
    D_T: tl.constexpr,
    D_S: tl.constexpr,
    DIM_T: tl.constexpr,
    DIM_S: tl.constexpr,
    OUT: tl.constexpr,  # dimensions that a program makes
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # own tokens
    BLOCK_N: tl.constexpr,  # others
    FILLED: tl.constexpr,  # whether N fills a tile of the main loop
    TAIL: tl.constexpr,  # others of a tile where some pairs are not allowed
):
    PARTS: tl.constexpr = (D_S + OUT - 1) // OUT
    part, head, batch, relation = program(tl.cdiv(N, BLOCK_M) * PARTS, R, B)
    m, d = part // PARTS * BLOCK_M, part % PARTS * OUT
    offs_m = m + tl.arange(0, BLOCK_M)
    WHICH: tl.constexpr = 0 if AS_ROWS else 2
    token, first, end, start, full, last = visible_range(bounds, holes, WHICH, batch, m, B, N, FILLED, BLOCK_M, BLOCK_N)
    own_t = tokens(x_t, head_pointer(x_t, relation, batch, head), m, token, D_T, DIM_T, BLOCK_M)
    own_s = tokens(x_s, head_pointer(x_s, relation, batch, head), m, token, D_S, DIM_S, BLOCK_M)
    base_t, base_s = head_pointer(y_t, relation, batch, head), head_pointer(y_s, relation, batch, head)
    at = ((relation * B + batch) * R + head).to(tl.int64) * N
    own_lse_t, own_lse_s = load_own_lse(lse_t, lse_s, at + offs_m, token)
    sums = tl.zeros([BLOCK_M, OUT], tl.float32)

    for n in tl.range(start, full, BLOCK_N, disable_licm=True):  # as in `resident`
        t, s, _ = scores(
            own_t, own_s, token, x_t, x_s, y_t, y_s, base_t, base_s, n, None, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        g = _differences(
            t, s, own_lse_t, own_lse_s, lse_t, lse_s, grad, scales, at + (n + tl.arange(0, BLOCK_N)), None,
            AS_ROWS, AS_KEYS, REDUCES,
        )  # fmt: skip
        other = load_tokens(y_s, base_s, n, None, D_S, OUT, BLOCK_N, d)
        sums = tl.dot(g.to(other.dtype), other, sums, input_precision=PRECISION)
    for n in range(full, last, TAIL):
        seen = is_token(bounds, holes, batch, n, last, B, N, TAIL)
        t, s, _ = scores(
            own_t, own_s, token, x_t, x_s, y_t, y_s, base_t, base_s, n, seen, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_M, TAIL,
        )  # fmt: skip
        g = _differences(
            t, s, own_lse_t, own_lse_s, lse_t, lse_s, grad, scales, at + (n + tl.arange(0, TAIL)), seen,
            AS_ROWS, AS_KEYS, REDUCES,
        )  # fmt: skip
        other = load_tokens(y_s, base_s, n, seen, D_S, OUT, TAIL, d)
        sums = tl.dot(g.to(other.dtype), other, sums, input_precision=PRECISION)

    sums *= scales[2]
    if REDUCES:
        weight = weight_of(row_weight, scales[3], batch, m, offs_m < N, BLOCK_M)
        sums *= (weight * tl.load(grad) * pick(relation_weights, relation))[:, None]
    else:
        sums *= tl.load(unit)
        if AS_ROWS:
            sums *= load(grad + at + offs_m, token)[:, None]
    pointer = head_pointer(gradient, relation, batch, head)
    if ADDS:
        sums += load_tokens(gradient, pointer, m, token, D_S, OUT, BLOCK_M, d).to(tl.float32)
    sums = tl.where(token[:, None], sums, 0.0)
    store_tokens(gradient, pointer, m, sums, offs_m < N, D_S, OUT, BLOCK_M, d)


@triton.jit
def _differences(
    t, s, own_t, own_s, lse_t, lse_s, grad, scales, at, seen,
    AS_ROWS: tl.constexpr, AS_KEYS: tl.constexpr, REDUCES: tl.constexpr,
):  # fmt: skip
    """Q − P with the own tokens as rows, as keys, or the sum of both; seen is None where all others are."""
    g = _probabilities(s, scales[1], lse_s, own_s, at, seen, AS_ROWS, AS_KEYS)
    g -= _probabilities(t, scales[0], lse_t, own_t, at, seen, AS_ROWS, AS_KEYS)
    if AS_KEYS and not REDUCES:
        g *= load(grad + at, seen)[None, :]
    return g


@triton.jit
def _probabilities(products, scale, lse, own, at, seen, AS_ROWS: tl.constexpr, AS_KEYS: tl.constexpr):
    if AS_KEYS:
        as_keys = probability(products, scale, load_lse(lse, at, seen), 0)
    if AS_ROWS:
        as_rows = probability(products, scale, own, 1)
    if AS_ROWS and AS_KEYS:
        return as_rows + as_keys
    elif AS_ROWS:
        return as_rows
    else:
        return as_keys


def wide_launches(
    relations: Relations,
    problem: Problem,
    lse_t: Sequence[Tensor],
    lse_s: Sequence[Tensor],
    grad: Tensor,
    dx: list[Tensor],
    dy: list[Tensor],
    shape: Tiles,
) -> list[Launch]:
    """dX and dY; of a self relation its gradient, in one sweep if that is symmetric, else as rows and then as keys."""
    turned = relations._replace(x_t=relations.y_t, y_t=relations.x_t, x_s=relations.y_s, y_s=relations.x_s)
    if not relations.is_self:
        sweeps = [(relations, dx, (True, False), False), (turned, dy, (False, True), False)]
    elif problem.symmetric and problem.reduces:
        sweeps = [(relations, dx, (True, True), False)]
    else:
        sweeps = [(relations, dx, (True, False), False), (relations, dx, (False, True), True)]
    grad, unit = row_gradients(problem, grad)
    launches = []
    for own, gradients, (as_rows, as_keys), adds in sweeps:
        operands = {
            **shared_arguments(own, completes=True),
            "y_t": group(own.keys_t),
            "y_s": group(own.keys_s),
            "holes": own.holes,
            "lse_t": tuple(lse_t),
            "lse_s": tuple(lse_s),
            "grad": grad,
            "unit": unit,
            "relation_weights": tuple(own.relation_weights),
            "gradient": group(gradients),
        }
        launches.append(Launch(_schedule(problem, shape, as_rows, as_keys, adds), operands))
    return launches


@lru_cache(maxsize=1024)
def _schedule(problem: Problem, shape: Tiles, as_rows: bool, as_keys: bool, adds: bool) -> Schedule:
    block_m, block_n = shape[:2]
    out = output_dim(problem)
    programs, constants = sweep_grid(problem, block_m, block_n)
    constants = constants | {
        "AS_ROWS": as_rows,
        "AS_KEYS": as_keys,
        "ADDS": adds,
        "REDUCES": problem.reduces,
        "OUT": out,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return Schedule(wide_sweep, programs * triton.cdiv(problem.d_s, out), constants, *shape[2:])
