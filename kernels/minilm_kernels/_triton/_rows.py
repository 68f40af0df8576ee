"""Sweep over the keys of a block of rows: row loss, logarithms of the two softmax sums, and dX.

With t = scale_T x_T Y_Tᵀ and s = scale_S x_S Y_Sᵀ in base 2, over tiles of keys and relative to references m,

    p = 2^(t − m_T),   q = 2^(s − m_S),   l_T = Σ p,   l_S = Σ q,   a = Σ p ((t − m_T) − (s − m_S))
    KL  = ln 2 · (a / l_T + log2 (l_S / l_T))
    dX  = scale_S (o_D / l_S + o_T (ratio / l_S − 1 / l_T)),   o_D = Σ (q − ratio · p) y_S,   o_T = Σ p y_S
dX costs two products more and no exponential. Weights are rounded to the tensors' type for the products. With Σ q y_S
in place of o_D, the difference of two sums would keep the rounding of either, however near the models are; o_D keeps
that of their difference, as ratio = l_S / l_T over the keys so far makes q and ratio · p what Q and P are.

References. In bfloat16 a row's score with its own token stands for its maximum (OWN_SCORE): no maximum of a tile, and
nothing shrinks. A tile of rows with a sum above HEADROOM starts again with running maxima, as float32 (whose errors
show) and float16 (which cannot hold such weights) do at once. When those rise by c_T and c_S, a becomes
(a − l_T (c_T − c_S)) 2^(−c_T), and all other sums just shrink. (Subtracting the two lse at the end instead would
cancel where scores are in the hundreds.)

G relations, B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S padded.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._launch import Launch, Schedule, group, shared_arguments, value_buffer
from minilm_kernels._triton._plan import Problem, Tiles, sweep_grid
from minilm_kernels._triton._steps import (
    FLOOR,
    LN2,
    head_pointer,
    is_token,
    load_tokens,
    log2_ratio,
    program,
    scores,
    store_lse,
    store_tokens,
    tokens,
    visible_range,
    weight_of,
)

HEADROOM: tl.constexpr = tl.constexpr(2.0**64)


@triton.jit
def row_sweep(
    x_t,  # ((pointers), strides) of G tensors (B, R, N, D_T)
    y_t,
    x_s,  # of G tensors (B, R, N, D_S)
    y_s,
    bounds,  # (4, B, N) or None
    holes,  # (B,) or None
    row_weight,  # (pointer, strides) of (B, N), or None
    value,  # REDUCES: (programs,), Σ weight · KL of each; else (G, B, R, N)
    lse_t,  # references and factors, each (G, B, R, N), see `store_lse`; or None
    lse_s,
    dx,  # of G tensors (B, R, N, D_S), or None
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
    TAIL: tl.constexpr,  # keys of a tile where some are not allowed
    OWN_SCORE: tl.constexpr,  # whether rows start from their own scores
):
    tile, head, batch, relation = program(tl.cdiv(N, BLOCK_M), R, B)
    m = tile * BLOCK_M
    inside = m + tl.arange(0, BLOCK_M) < N
    token, first, end, start, full, last = visible_range(bounds, holes, 0, batch, m, B, N, FILLED, BLOCK_M, BLOCK_N)
    query_t = tokens(x_t, head_pointer(x_t, relation, batch, head), m, token, D_T, DIM_T, BLOCK_M)
    query_s = tokens(x_s, head_pointer(x_s, relation, batch, head), m, token, D_S, DIM_S, BLOCK_M)
    key_t, key_s = head_pointer(y_t, relation, batch, head), head_pointer(y_s, relation, batch, head)
    if OWN_SCORE:
        own_t = load_tokens(y_t, key_t, m, token, D_T, DIM_T, BLOCK_M)
        own_s = load_tokens(y_s, key_s, m, token, D_S, DIM_S, BLOCK_M)
        m_t, m_s = _row_products(query_t, own_t) * scales[0], _row_products(query_s, own_s) * scales[1]
    else:
        m_t, m_s = tl.full([BLOCK_M], FLOOR, tl.float32), tl.full([BLOCK_M], FLOOR, tl.float32)
    l_t, l_s = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    o_t, o_d = tl.zeros([BLOCK_M, DIM_S], tl.float32), tl.zeros([BLOCK_M, DIM_S], tl.float32)
    ratio = tl.zeros([BLOCK_M], tl.float32)

    for n in range(start, full, BLOCK_N):
        t, s, tile_s = scores(
            query_t, query_s, token, x_t, x_s, y_t, y_s, key_t, key_s, n, None, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if OWN_SCORE:
            l_t, l_s, a, o_t, o_d, ratio = _update(
                m_t, m_s, l_t, l_s, a, o_t, o_d, ratio, t, s, scales, tile_s, dx, PRECISION
            )
        else:
            m_t, m_s, l_t, l_s, a, o_t, o_d, ratio = _online_update(
                m_t, m_s, l_t, l_s, a, o_t, o_d, ratio, t, s, scales, tile_s, dx, PRECISION
            )
    if OWN_SCORE:
        within = (full > start) & (tl.maximum(tl.max(l_t, 0), tl.max(l_s, 0)) <= HEADROOM)
        full = tl.where(within, full, start)
        m_t, m_s = tl.where(within, m_t, FLOOR), tl.where(within, m_s, FLOOR)
        l_t, l_s, a = tl.where(within, l_t, 0.0), tl.where(within, l_s, 0.0), tl.where(within, a, 0.0)
        o_t, o_d, ratio = tl.where(within, o_t, 0.0), tl.where(within, o_d, 0.0), tl.where(within, ratio, 0.0)
    for n in range(full, last, TAIL):
        key = is_token(bounds, holes, batch, n, last, B, N, TAIL)
        t, s, tile_s = scores(
            query_t, query_s, token, x_t, x_s, y_t, y_s, key_t, key_s, n, key, first, end,
            D_T, D_S, DIM_T, DIM_S, PRECISION, BLOCK_M, TAIL,
        )  # fmt: skip
        m_t, m_s, l_t, l_s, a, o_t, o_d, ratio = _online_update(
            m_t, m_s, l_t, l_s, a, o_t, o_d, ratio, t, s, scales, tile_s, dx, PRECISION
        )

    l_t, l_s = tl.where(token, l_t, 1.0), tl.where(token, l_s, 1.0)
    kl = tl.where(token, LN2 * (a / l_t + log2_ratio(l_s, l_t)), 0.0)
    weight = weight_of(row_weight, scales[3], batch, m, inside, BLOCK_M)
    at = ((relation * B + batch) * R + head).to(tl.int64) * N + m + tl.arange(0, BLOCK_M)
    if REDUCES:
        tl.store(value + tl.program_id(0), tl.sum(kl * weight, 0))
    else:
        tl.store(value + at, kl, mask=inside)
    if lse_t is not None:
        store_lse(lse_t, lse_s, at, token, inside, m_t, m_s, l_t, l_s, dx is None)
    if dx is not None:
        gradient = (o_d / l_s[:, None] + o_t * (ratio / l_s - 1.0 / l_t)[:, None]) * scales[2]
        if WEIGHTED:
            gradient *= weight[:, None]
        gradient = tl.where(token[:, None], gradient, 0.0)
        store_tokens(dx, head_pointer(dx, relation, batch, head), m, gradient, inside, D_S, DIM_S, BLOCK_M)


@triton.jit
def _row_products(x, y):
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def _update(m_t, m_s, l_t, l_s, a, o_t, o_d, ratio, t, s, scales, tile_s, dx, PRECISION: tl.constexpr):
    """The sums after one more tile of products, where the references stay."""
    t, s = tl.fma(t, scales[0], -m_t[:, None]), tl.fma(s, scales[1], -m_s[:, None])  # as in `exponential`
    p, q = tl.exp2(t), tl.exp2(s)
    l_t, l_s, a = l_t + tl.sum(p, 1), l_s + tl.sum(q, 1), a + tl.sum(p * (t - s), 1)
    if dx is not None:
        o_t, o_d, ratio = _weighted(o_t, o_d, ratio, l_t, l_s, p, q, None, None, tile_s, PRECISION)
    return l_t, l_s, a, o_t, o_d, ratio


@triton.jit
def _online_update(m_t, m_s, l_t, l_s, a, o_t, o_d, ratio, t, s, scales, tile_s, dx, PRECISION: tl.constexpr):
    """The running sums after one more tile of products; their scale is applied where it costs nothing.

    Two sums instead of one of p (t − s): that would hold both tiles of scores in registers beside p, and spill.
    """
    new_t, new_s = tl.maximum(m_t, tl.max(t, 1) * scales[0]), tl.maximum(m_s, tl.max(s, 1) * scales[1])
    shrink_t, shrink_s = tl.exp2(m_t - new_t), tl.exp2(m_s - new_s)
    t, s = tl.fma(t, scales[0], -new_t[:, None]), tl.fma(s, scales[1], -new_s[:, None])  # as in `exponential`
    p, q = tl.exp2(t), tl.exp2(s)
    a = (a - l_t * ((new_t - m_t) - (new_s - m_s))) * shrink_t + (tl.sum(p * t, 1) - tl.sum(p * s, 1))
    l_t = l_t * shrink_t + tl.sum(p, 1)
    l_s = l_s * shrink_s + tl.sum(q, 1)
    if dx is not None:
        o_t, o_d, ratio = _weighted(o_t, o_d, ratio, l_t, l_s, p, q, shrink_t, shrink_s, tile_s, PRECISION)
    return new_t, new_s, l_t, l_s, a, o_t, o_d, ratio


@triton.jit
def _ratio(l_s, l_t):
    """l_s / l_t, but finite: any number serves, near that one best."""
    return tl.minimum(l_s / tl.maximum(l_t, 2.0**-64), 2.0**64)


@triton.jit
def _weighted(o_t, o_d, ratio, l_t, l_s, p, q, shrink_t, shrink_s, tile_s, PRECISION: tl.constexpr):
    """The two weighted sums and the ratio after one more tile; shrink None: the references stayed."""
    new = _ratio(l_s, l_t)
    if shrink_t is None:
        o_d += o_t * (ratio - new)[:, None]
    else:
        o_d = o_d * shrink_s[:, None] + o_t * (ratio * shrink_s - new * shrink_t)[:, None]
        o_t *= shrink_t[:, None]
    o_d = tl.dot((q - new[:, None] * p).to(tile_s.dtype), tile_s, o_d, input_precision=PRECISION)
    return tl.dot(p.to(tile_s.dtype), tile_s, o_t, input_precision=PRECISION), o_d, new


def row_launch(
    relations: Relations,
    problem: Problem,
    lse_t: Sequence[Tensor],
    lse_s: Sequence[Tensor],
    dx: list[Tensor],
    shape: Tiles,
) -> Launch:
    schedule = _schedule(problem, shape, bool(dx))
    operands = {
        **shared_arguments(relations),
        "y_t": group(relations.keys_t),
        "y_s": group(relations.keys_s),
        "holes": relations.holes,
        "value": value_buffer(relations, problem, schedule.programs),
        "lse_t": tuple(lse_t) or None,  # Triton 3.6 takes no None inside a tuple
        "lse_s": tuple(lse_s) or None,
        "dx": group(dx),
    }
    return Launch(schedule, operands)


@lru_cache(maxsize=1024)
def _schedule(problem: Problem, shape: Tiles, with_gradient: bool) -> Schedule:
    block_m, block_n = shape[:2]
    programs, constants = sweep_grid(problem, block_m, block_n)
    starts_from_own = not with_gradient or problem.dtype_s != torch.float16
    constants = constants | {
        "REDUCES": problem.reduces,
        "WEIGHTED": problem.reduces and problem.weights_in_gradients,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "OWN_SCORE": problem.element_size == 2 and not problem.is_wide and starts_from_own,
    }
    return Schedule(row_sweep, programs, constants, *shape[2:])
