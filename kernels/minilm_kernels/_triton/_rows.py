"""Sweep over the keys of a block of rows: row loss, logarithms of the two softmax sums, and dX of unit row weight.

With t = scale_T x_T Y_Tᵀ and s = scale_S x_S Y_Sᵀ in base 2, over tiles of keys and relative to running maxima m,

    l_T = Σ 2^(t − m_T),   l_S = Σ 2^(s − m_S),   a = Σ 2^(t − m_T) ((t − m_T) − (s − m_S))
    KL  = ln 2 · (a / l_T − log2 l_T + log2 l_S)
    dX  = scale_S (o_S / l_S − o_T / l_T),   o_S = Σ 2^(s − m_S) y_S,   o_T = Σ 2^(t − m_T) y_S
When the maxima rise by c_T and c_S, a becomes (a − l_T (c_T − c_S)) 2^(−c_T), l and o just shrink. (Subtracting the two
lse at the end instead would cancel where scores are in the hundreds.) dX costs two products more and no exponential.

B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S padded to a power of two.
"""

import triton
import triton.language as tl

from minilm_kernels._triton._steps import (
    FLOOR,
    LN2,
    common_range,
    head_pointer,
    interval,
    load_tile,
    load_tokens,
    store_tokens,
)


@triton.jit
def _row_sweep(
    x_t,  # (pointer, strides) of (B, R, N, D_T), and so on
    y_t,
    x_s,
    y_s,
    bounds,  # (4, B, N) or None
    holes,  # (B,) or None
    outputs,  # rows, lse_t, lse_s: (B, R, N)
    dx,  # (pointer, strides) of (B, R, N, D_S), or None
    scales,  # scale_t, scale_s times log2 e; scale_s
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
):
    blocks = tl.cdiv(N, BLOCK_M)
    m = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(0) // blocks % R
    batch = tl.program_id(0) // blocks // R
    inside = m + tl.arange(0, BLOCK_M) < N
    if bounds is None:
        first, end, token = m * 0, N, inside
        start, full, last = m * 0, N // BLOCK_N * BLOCK_N, N
    else:
        first, end = interval(bounds, 0, batch, m, B, N, BLOCK_M)
        token = first < end
        start, full, last = common_range(first, end, holes, batch, N, BLOCK_N)

    query_t = load_tokens(x_t, head_pointer(x_t, batch, head), m, token, D_T, DIM_T, BLOCK_M)
    query_s = load_tokens(x_s, head_pointer(x_s, batch, head), m, token, D_S, DIM_S, BLOCK_M)
    key_t, key_s = head_pointer(y_t, batch, head), head_pointer(y_s, batch, head)
    m_t = tl.full([BLOCK_M], FLOOR, tl.float32)
    m_s, l_t, l_s = m_t, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    o_t = tl.zeros([BLOCK_M, DIM_S], tl.float32)
    o_s = tl.zeros([BLOCK_M, DIM_S], tl.float32)

    for n in range(start, full, BLOCK_N):
        tile_t = load_tile(y_t, key_t, n, D_T, DIM_T, BLOCK_N)
        tile_s = load_tile(y_s, key_s, n, D_S, DIM_S, BLOCK_N)
        t = tl.dot(query_t, tile_t.T, input_precision=PRECISION) * scales[0]
        s = tl.dot(query_s, tile_s.T, input_precision=PRECISION) * scales[1]
        m_t, m_s, l_t, l_s, a, o_t, o_s = _online_update(m_t, m_s, l_t, l_s, a, o_t, o_s, t, s, tile_s, dx, PRECISION)
    for n in range(full, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        key = offs_n < N
        if bounds is not None:
            row_first, row_end = interval(bounds, 2, batch, n, B, N, BLOCK_N)
            key = row_first < row_end
        tile_t = load_tokens(y_t, key_t, n, key, D_T, DIM_T, BLOCK_N)
        tile_s = load_tokens(y_s, key_s, n, key, D_S, DIM_S, BLOCK_N)
        allowed = key[None, :]
        if bounds is not None:
            allowed = allowed & (offs_n[None, :] >= first[:, None]) & (offs_n[None, :] < end[:, None])
        t = tl.dot(query_t, tile_t.T, input_precision=PRECISION) * scales[0]
        s = tl.dot(query_s, tile_s.T, input_precision=PRECISION) * scales[1]
        t, s = tl.where(allowed, t, FLOOR), tl.where(allowed, s, FLOOR)
        m_t, m_s, l_t, l_s, a, o_t, o_s = _online_update(m_t, m_s, l_t, l_s, a, o_t, o_s, t, s, tile_s, dx, PRECISION)

    at = (batch * R + head).to(tl.int64) * N + m + tl.arange(0, BLOCK_M)
    l_t, l_s = tl.where(token, l_t, 1.0), tl.where(token, l_s, 1.0)
    kl = LN2 * (a / l_t - tl.log2(l_t) + tl.log2(l_s))
    tl.store(outputs[0] + at, tl.where(token, kl, 0.0), mask=inside)
    if dx is not None:
        tl.store(outputs[1] + at, tl.where(token, m_t + tl.log2(l_t), float("inf")), mask=inside)
        tl.store(outputs[2] + at, tl.where(token, m_s + tl.log2(l_s), float("inf")), mask=inside)
        gradient = (o_s / l_s[:, None] - o_t / l_t[:, None]) * scales[2]
        gradient = tl.where(token[:, None], gradient, 0.0)
        store_tokens(dx, head_pointer(dx, batch, head), m, gradient, inside, D_S, DIM_S, BLOCK_M)


@triton.jit
def _online_update(m_t, m_s, l_t, l_s, a, o_t, o_s, t, s, tile_s, dx, PRECISION: tl.constexpr):
    """The running sums after one more tile of scores."""
    new_t, new_s = tl.maximum(m_t, tl.max(t, 1)), tl.maximum(m_s, tl.max(s, 1))
    shrink_t, shrink_s = tl.exp2(m_t - new_t), tl.exp2(m_s - new_s)
    t, s = t - new_t[:, None], s - new_s[:, None]
    p, q = tl.exp2(t), tl.exp2(s)
    a = (a - l_t * ((new_t - m_t) - (new_s - m_s))) * shrink_t + tl.sum(p * (t - s), 1)
    l_t = l_t * shrink_t + tl.sum(p, 1)
    l_s = l_s * shrink_s + tl.sum(q, 1)
    if dx is not None:
        p, q = p.to(tile_s.dtype), q.to(tile_s.dtype)
        o_t = tl.dot(p, tile_s, o_t * shrink_t[:, None], input_precision=PRECISION)
        o_s = tl.dot(q, tile_s, o_s * shrink_s[:, None], input_precision=PRECISION)
    return new_t, new_s, l_t, l_s, a, o_t, o_s
