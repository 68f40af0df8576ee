"""The gradient of a self relation (QQ, KK, VV) in one sweep, where a row sees those keys that see it.

The scores are symmetric, s_ij = s_ji, so that with weights equal along a sequence

    dX_i = w_i scale_S Σ_j (Q_ij + Q_ji − P_ij − P_ji) x_j
    P_ij + P_ji = 2^(t_ij − lse_i) (1 + 2^(lse_i − lse_j)) = e_ij (1 + a_i b_j)
    a_i = 2^(lse_i − c),   b_j = 2^(c − lse_j)
and likewise Q: two exponentials an element instead of four. c is the middle of the lse that the sweep meets; where they
spread over more than SPREAD powers of two, a_i b_j could overflow while e_ij underflows, and all four are computed.

G relations, B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S padded.
"""

import triton
import triton.language as tl

from minilm_kernels._triton._steps import (
    FLOOR,
    head_pointer,
    is_token,
    load_all_lse,
    load_lse,
    load_tile,
    load_tokens,
    partners,
    pick,
    probability,
    program,
    store_tokens,
    weight_of,
)

SPREAD: tl.constexpr = tl.constexpr(100.0)
SCAN: tl.constexpr = tl.constexpr(1024)


@triton.jit
def self_sweep(
    x_t,  # ((pointers), strides) of G tensors (B, R, N, D_T)
    x_s,  # of G tensors (B, R, N, D_S)
    bounds,  # (4, B, N) or None
    holes,  # (B,) or None
    row_weight,  # (pointer, strides) of (B, N), or None
    lse_t,  # as row_sweep stores it
    lse_s,
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
    token, first, end, start, full, last = partners(bounds, holes, 0, batch, m, B, N, FILLED, BLOCK_M, BLOCK_N)
    base_t, base_s = head_pointer(x_t, relation, batch, head), head_pointer(x_s, relation, batch, head)
    query_t = load_tokens(x_t, base_t, m, token, D_T, DIM_T, BLOCK_M)
    query_s = load_tokens(x_s, base_s, m, token, D_S, DIM_S, BLOCK_M)
    at = ((relation * B + batch) * R + head).to(tl.int64) * N
    own_t, low_t = load_lse(lse_t, at + offs_m, token)
    own_s, low_s = load_lse(lse_s, at + offs_m, token)
    c_t, fits_t = _middle(lse_t[0] + at, start, full)
    c_s, fits_s = _middle(lse_s[0] + at, start, full)
    full = tl.where(fits_t & fits_s & _near(own_t, c_t, token) & _near(own_s, c_s, token), full, start)
    a_t = tl.exp2(tl.minimum(own_t - c_t, SPREAD) + low_t)
    a_s = tl.exp2(tl.minimum(own_s - c_s, SPREAD) + low_s)
    sums = tl.zeros([BLOCK_M, DIM_S], tl.float32)

    for n in range(start, full, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        tile_t = load_tile(x_t, base_t, n, D_T, DIM_T, BLOCK_N)
        tile_s = load_tile(x_s, base_s, n, D_S, DIM_S, BLOCK_N)
        t = tl.dot(query_t, tile_t.T, input_precision=PRECISION) * scales[0]
        s = tl.dot(query_s, tile_s.T, input_precision=PRECISION) * scales[1]
        key_t, key_low_t = load_all_lse(lse_t, at + offs_n)
        key_s, key_low_s = load_all_lse(lse_s, at + offs_n)
        b_t, b_s = tl.exp2(c_t - key_t - key_low_t), tl.exp2(c_s - key_s - key_low_s)
        g = probability(s, lse_s, own_s, low_s, 1) * (1.0 + a_s[:, None] * b_s[None, :])
        g -= probability(t, lse_t, own_t, low_t, 1) * (1.0 + a_t[:, None] * b_t[None, :])
        sums = tl.dot(g.to(tile_s.dtype), tile_s, sums, input_precision=PRECISION)
    for n in range(full, last, TAIL):
        offs_n = n + tl.arange(0, TAIL)
        key = is_token(bounds, holes, batch, n, last, B, N, TAIL)
        tile_t = load_tokens(x_t, base_t, n, key, D_T, DIM_T, TAIL)
        tile_s = load_tokens(x_s, base_s, n, key, D_S, DIM_S, TAIL)
        allowed = key[None, :] & (offs_n[None, :] >= first[:, None]) & (offs_n[None, :] < end[:, None])
        t = tl.where(allowed, tl.dot(query_t, tile_t.T, input_precision=PRECISION) * scales[0], FLOOR)
        s = tl.where(allowed, tl.dot(query_s, tile_s.T, input_precision=PRECISION) * scales[1], FLOOR)
        key_t, key_low_t = load_lse(lse_t, at + offs_n, key)
        key_s, key_low_s = load_lse(lse_s, at + offs_n, key)
        g = probability(s, lse_s, own_s, low_s, 1) - probability(t, lse_t, own_t, low_t, 1)
        g += probability(s, lse_s, key_s, key_low_s, 0) - probability(t, lse_t, key_t, key_low_t, 0)
        sums = tl.dot(g.to(tile_s.dtype), tile_s, sums, input_precision=PRECISION)

    factor = weight_of(row_weight, scales[3], batch, m, offs_m < N, BLOCK_M) * scales[2]
    factor *= tl.load(grad) * pick(relation_weights, relation)
    gradient = tl.where(token[:, None], sums * factor[:, None], 0.0)
    store_tokens(dx, head_pointer(dx, relation, batch, head), m, gradient, offs_m < N, D_S, DIM_S, BLOCK_M)


@triton.jit
def _middle(lse, start, end):
    """Middle of lse[start:end], and whether they spread over at most SPREAD."""
    low, high = tl.full([SCAN], float("inf"), tl.float32), tl.full([SCAN], float("-inf"), tl.float32)
    for n in range(start, end, SCAN):
        offs = n + tl.arange(0, SCAN)
        low = tl.minimum(low, tl.load(lse + offs, mask=offs < end, other=float("inf")))
        high = tl.maximum(high, tl.load(lse + offs, mask=offs < end, other=float("-inf")))
    any_token = start < end
    lowest, highest = tl.where(any_token, tl.min(low, 0), 0.0), tl.where(any_token, tl.max(high, 0), 0.0)
    return (lowest + highest) * 0.5, highest - lowest <= SPREAD


@triton.jit
def _near(lse, middle, token):
    """Whether these too lie within half of SPREAD of the middle."""
    return tl.max(tl.where(token, tl.abs(lse - middle), 0.0), 0) <= SPREAD * 0.5
