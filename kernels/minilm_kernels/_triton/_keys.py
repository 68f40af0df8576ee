"""Sweep over the rows that see a block of keys: dY, and the weighing of dX, given the logarithms of the softmax sums.

    G_ij = Q_ij − P_ij = 2^(s_ij − lse_S,i) − 2^(t_ij − lse_T,i),   dY_j = scale_S Σ_i w_i G_ij x_S,i
    dX_i = w_i · (dX of unit weight);   a self relation has dX + dY as its gradient
Where w is equal along a sequence it leaves the sum: it would push a float16 G below its smallest number. Row weights of
every kind are given relative to their largest, `unit`.

B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S padded to a power of two.
"""

import triton
import triton.language as tl

from minilm_kernels._triton._steps import (
    common_range,
    head_pointer,
    interval,
    load_tile,
    load_tokens,
    store_tokens,
)


@triton.jit
def _key_sweep(
    x_t,  # (pointer, strides) of (B, R, N, D_T), and so on
    y_t,
    x_s,
    y_s,
    bounds,  # (4, B, N) or None
    holes,  # (B,) or None
    lse_t,  # (B, R, N) in base 2, inf where there is no token
    lse_s,
    weight,  # (pointer, strides) of (B, R, N)
    unit,  # one number
    unit_dx,  # (pointer, strides) of (B, R, N, D_S)
    dx,
    dy,  # None for a self relation
    scales,  # scale_t, scale_s times log2 e; scale_s
    B,
    R,
    N,
    ALONG_SEQUENCE: tl.constexpr,
    D_T: tl.constexpr,
    D_S: tl.constexpr,
    DIM_T: tl.constexpr,
    DIM_S: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N
    head = tl.program_id(0) // blocks % R
    batch = tl.program_id(0) // blocks // R
    inside = n + tl.arange(0, BLOCK_N) < N
    if bounds is None:
        first, end, token = n * 0, N, inside
        start, full, last = n * 0, N // BLOCK_M * BLOCK_M, N
    else:
        first, end = interval(bounds, 2, batch, n, B, N, BLOCK_N)
        token = first < end
        start, full, last = common_range(first, end, holes, batch, N, BLOCK_M)

    key_t = load_tokens(y_t, head_pointer(y_t, batch, head), n, token, D_T, DIM_T, BLOCK_N)
    key_s = load_tokens(y_s, head_pointer(y_s, batch, head), n, token, D_S, DIM_S, BLOCK_N)
    row_t, row_s = head_pointer(x_t, batch, head), head_pointer(x_s, batch, head)
    at = (batch * R + head).to(tl.int64) * N
    lse_t += at
    lse_s += at
    weights = head_pointer(weight, batch, head)
    sums = tl.zeros([BLOCK_N, DIM_S], tl.float32)

    for m in range(start, full, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        tile_t = load_tile(x_t, row_t, m, D_T, DIM_T, BLOCK_M)
        tile_s = load_tile(x_s, row_s, m, D_S, DIM_S, BLOCK_M)
        t = tl.dot(key_t, tile_t.T, input_precision=PRECISION) * scales[0]
        s = tl.dot(key_s, tile_s.T, input_precision=PRECISION) * scales[1]
        g = tl.exp2(s - tl.load(lse_s + offs_m)[None, :]) - tl.exp2(t - tl.load(lse_t + offs_m)[None, :])
        if not ALONG_SEQUENCE:
            g *= tl.load(weights + offs_m.to(tl.int64) * weight[3])[None, :]
        sums = tl.dot(g.to(tile_s.dtype), tile_s, sums, input_precision=PRECISION)
    for m in range(full, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        row = offs_m < N
        if bounds is not None:
            key_first, key_end = interval(bounds, 0, batch, m, B, N, BLOCK_M)
            row = key_first < key_end
        tile_t = load_tokens(x_t, row_t, m, row, D_T, DIM_T, BLOCK_M)
        tile_s = load_tokens(x_s, row_s, m, row, D_S, DIM_S, BLOCK_M)
        t = tl.dot(key_t, tile_t.T, input_precision=PRECISION) * scales[0]
        s = tl.dot(key_s, tile_s.T, input_precision=PRECISION) * scales[1]
        lse_t_m = tl.load(lse_t + offs_m, mask=row, other=float("inf"))
        lse_s_m = tl.load(lse_s + offs_m, mask=row, other=float("inf"))
        if bounds is not None:
            allowed = (offs_m[None, :] >= first[:, None]) & (offs_m[None, :] < end[:, None])
            t, s = tl.where(allowed, t, float("-inf")), tl.where(allowed, s, float("-inf"))
        g = tl.exp2(s - lse_s_m[None, :]) - tl.exp2(t - lse_t_m[None, :])
        if not ALONG_SEQUENCE:
            g *= tl.load(weights + offs_m.to(tl.int64) * weight[3], mask=row, other=0.0)[None, :]
        sums = tl.dot(g.to(tile_s.dtype), tile_s, sums, input_precision=PRECISION)

    own = tl.load(weights + (n + tl.arange(0, BLOCK_N)).to(tl.int64) * weight[3], mask=token, other=0.0)
    own = own * tl.load(unit)
    sums *= scales[2]
    if ALONG_SEQUENCE:
        sums *= own[:, None]
    else:
        sums *= tl.load(unit)
    gradient = load_tokens(unit_dx, head_pointer(unit_dx, batch, head), n, token, D_S, DIM_S, BLOCK_N)
    gradient = gradient.to(tl.float32) * own[:, None]
    if dy is None:
        gradient += sums
    else:
        sums = tl.where(token[:, None], sums, 0.0)
        store_tokens(dy, head_pointer(dy, batch, head), n, sums, inside, D_S, DIM_S, BLOCK_N)
    gradient = tl.where(token[:, None], gradient, 0.0)
    store_tokens(dx, head_pointer(dx, batch, head), n, gradient, inside, D_S, DIM_S, BLOCK_N)
