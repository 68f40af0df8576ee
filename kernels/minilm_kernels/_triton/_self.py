"""The gradient of a self relation (QQ, KK, VV) in one sweep, where a row sees those keys that see it.

The scores are symmetric, s_ij = s_ji, so that with weights equal along a sequence

    dX_i = w_i scale_S Σ_j (Q_ij + Q_ji − P_ij − P_ji) x_j
    P_ij = f_i 2^(t_ij − m_i),   P_ij + P_ji = 2^(t_ij − m_i) (f_i + 2^(m_i − m_j) f_j) = e_ij (f_i + a_i b_j)
    a_i = 2^(m_i − c),   b_j = f_j 2^(c − m_j)
and likewise Q: two exponentials an element instead of four. References m and factors f are those of `store_lse`. c is
the smallest m of the head, so that no b overflows. Tiles with a row whose m is more than HEADROOM above c compute all
four; in the others what e_ij or b_j lose by underflow is below 2^(HEADROOM − 126) of a probability.

G relations, B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S padded.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._launch import Launch, Schedule, group, shared_arguments
from minilm_kernels._triton._plan import Problem, Tiles, sweep_grid
from minilm_kernels._triton._steps import (
    exponential,
    head_pointer,
    is_token,
    load_lse,
    load_own_lse,
    load_tokens,
    pick,
    probability,
    program,
    scores,
    store_tokens,
    visible_range,
    weight_of,
)

HEADROOM: tl.constexpr = tl.constexpr(64.0)
SCAN: tl.constexpr = tl.constexpr(1024)


@triton.jit
def key_factors(
    lse_t,  # as row_sweep stores it
    lse_s,
    base_t,  # (G, B, R), c of each head
    base_s,
    factor_t,  # (G, B, R, N), b of each key
    factor_s,
    N,
):
    _key_factors(lse_t, base_t, factor_t, N)
    _key_factors(lse_s, base_s, factor_s, N)


@triton.jit
def _key_factors(lse, base, factor, N):
    head = tl.program_id(0).to(tl.int64)
    highest = tl.full([SCAN], float("-inf"), tl.float32)  # of −reference, as where there is no token
    for n in range(0, N, SCAN):
        offs = n + tl.arange(0, SCAN)
        highest = tl.maximum(highest, tl.load(lse[0] + head * N + offs, mask=offs < N, other=float("-inf")))
    c = -tl.max(highest, 0)
    c = tl.where(c < float("inf"), c, 0.0)
    tl.store(base + head, c)
    for n in range(0, N, SCAN):
        offs = n + tl.arange(0, SCAN)
        own = load_lse(lse, head * N + offs, offs < N)
        b = tl.exp2(c + own[0])
        if len(lse) == 2:
            b *= own[1]
        tl.store(factor + head * N + offs, b, mask=offs < N)


@triton.jit
def self_sweep(
    x_t,  # ((pointers), strides) of G tensors (B, R, N, D_T)
    x_s,  # of G tensors (B, R, N, D_S)
    bounds,  # (4, B, N) or None
    holes,  # (B,) or None
    row_weight,  # (pointer, strides) of (B, N), or None
    lse_t,  # as row_sweep stores it
    lse_s,
    bases,  # c_t and c_s, as key_factors stores them
    factors,  # b_t and b_s
    grad,  # of the weighted sum, one number
    relation_weights,
    dx,  # of G tensors (B, R, N, D_S)
    scales,  # scale_t log2 e, scale_s log2 e, scale_s, weight
    B,
    R,
    N,
    D_T: tl.constexpr,
    D_S: tl.constexpr,
    DIM_T: tl.constexpr,
    DIM_S: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FILLED: tl.constexpr,  # whether N fills a tile of the main loop
    TAIL: tl.constexpr,  # keys of a tile where some are not allowed
):
    tile, head, batch, relation = program(tl.cdiv(N, BLOCK_M), R, B)
    m = tile * BLOCK_M
    offs_m = m + tl.arange(0, BLOCK_M)
    token, first, end, start, full, last = visible_range(bounds, holes, 0, batch, m, B, N, FILLED, BLOCK_M, BLOCK_N)
    row_t, row_s = head_pointer(x_t, relation, batch, head), head_pointer(x_s, relation, batch, head)
    query_t = load_tokens(x_t, row_t, m, token, D_T, DIM_T, BLOCK_M)
    query_s = load_tokens(x_s, row_s, m, token, D_S, DIM_S, BLOCK_M)
    which = ((relation * B + batch) * R + head).to(tl.int64)
    at = which * N
    own_lse_t, own_lse_s = load_own_lse(lse_t, lse_s, at + offs_m, token)
    above_t, above_s = _above(bases[0] + which, own_lse_t, token), _above(bases[1] + which, own_lse_s, token)
    full = tl.where(tl.maximum(tl.max(above_t, 0), tl.max(above_s, 0)) <= HEADROOM, full, start)
    a_t, a_s = tl.exp2(tl.minimum(above_t, HEADROOM)), tl.exp2(tl.minimum(above_s, HEADROOM))
    sums = tl.zeros([BLOCK_M, DIM_S], tl.float32)

    for n in range(start, full, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        t, s, tile_s = scores(
            query_t, query_s, token, x_t, x_s, x_t, x_s, row_t, row_s, n, None, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_t, b_s = tl.load(factors[0] + at + offs_n), tl.load(factors[1] + at + offs_n)
        g = exponential(s, scales[1], own_lse_s[0], 1) * (own_lse_s[1][:, None] + a_s[:, None] * b_s[None, :])
        g -= exponential(t, scales[0], own_lse_t[0], 1) * (own_lse_t[1][:, None] + a_t[:, None] * b_t[None, :])
        sums = tl.dot(g.to(tile_s.dtype), tile_s, sums, input_precision=PRECISION)
    for n in range(full, last, TAIL):
        offs_n = n + tl.arange(0, TAIL)
        key = is_token(bounds, holes, batch, n, last, B, N, TAIL)
        t, s, tile_s = scores(
            query_t, query_s, token, x_t, x_s, x_t, x_s, row_t, row_s, n, key, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_M, TAIL,
        )  # fmt: skip
        g = probability(s, scales[1], own_lse_s, 1) - probability(t, scales[0], own_lse_t, 1)
        g += probability(s, scales[1], load_lse(lse_s, at + offs_n, key), 0)
        g -= probability(t, scales[0], load_lse(lse_t, at + offs_n, key), 0)
        sums = tl.dot(g.to(tile_s.dtype), tile_s, sums, input_precision=PRECISION)

    factor = weight_of(row_weight, scales[3], batch, m, offs_m < N, BLOCK_M) * scales[2]
    factor *= tl.load(grad) * pick(relation_weights, relation)
    gradient = tl.where(token[:, None], sums * factor[:, None], 0.0)
    store_tokens(dx, head_pointer(dx, relation, batch, head), m, gradient, offs_m < N, D_S, DIM_S, BLOCK_M)


@triton.jit
def _above(base, lse, token):
    """How far the references of the tokens lie above the smallest of their head."""
    return tl.where(token, -lse[0] - tl.load(base), 0.0)


def factor_launch(
    problem: Problem, lse_t: Sequence[Tensor], lse_s: Sequence[Tensor], bases: list[Tensor], factors: list[Tensor]
) -> Launch:
    operands = {
        "lse_t": tuple(lse_t),
        "lse_s": tuple(lse_s),
        "base_t": bases[0],
        "base_s": bases[1],
        "factor_t": factors[0],
        "factor_s": factors[1],
    }
    return Launch(_factor_schedule(problem), operands)


@lru_cache(maxsize=1024)
def _factor_schedule(problem: Problem) -> Schedule:
    return Schedule(key_factors, math.prod(problem.shape[:3]), {"N": problem.shape[3]}, 4, 1)


def self_launch(
    relations: Relations,
    problem: Problem,
    lse_t: Sequence[Tensor],
    lse_s: Sequence[Tensor],
    bases: list[Tensor],
    factors: list[Tensor],
    grad: Tensor,
    dx: list[Tensor],
    shape: Tiles,
) -> Launch:
    operands = {
        **shared_arguments(relations, completes=True),
        "holes": relations.holes,
        "lse_t": tuple(lse_t),
        "lse_s": tuple(lse_s),
        "bases": tuple(bases),
        "factors": tuple(factors),
        "grad": grad,
        "relation_weights": tuple(relations.relation_weights),
        "dx": group(dx),
    }
    return Launch(_self_schedule(problem, shape), operands)


@lru_cache(maxsize=1024)
def _self_schedule(problem: Problem, shape: Tiles) -> Schedule:
    block_m, block_n = shape[:2]
    programs, constants = sweep_grid(problem, block_m, block_n)
    return Schedule(self_sweep, programs, constants | {"BLOCK_M": block_m, "BLOCK_N": block_n}, *shape[2:])
