"""Self relations (QQ, KK, VV) in one visit to each unordered pair of tokens, forward and backward.

The scores are symmetric, s_ij = s_ji, and so is e_ij = 2^(s_ij − c) with one reference c for the head. With
h_i = s_ii / 2 and c = min h + max h, all scores obey s_ij ≤ h_i + h_j, so that e_ij and the sums l_i = Σ_j e_ij lie
between 2^(min h − max h) and N 2^(max h − min h). A pair of tiles serves the rows of both:

    P_ij = e_ij / l_i,   P_ji = e_ij / l_j
    forward    l_i += e_ij,  l_j += e_ij,  a_i += e^T_ij (t_ij − s_ij),  a_j likewise
               KL_i = ln 2 · (a_i / l^T_i − log2 l^T_i + log2 l^S_i),   t and s relative to their c
    backward   g_ij = e^S_ij (r^S_i + r^S_j) − e^T_ij (r^T_i + r^T_j),   r_i = 2^(c − lse_i) = 1 / l_i
               dX_i += g_ij x_j,  dX_j += g_ij x_i,   times w scale_S
Backward takes c = (min lse + max lse) / 2: any c serves that keeps e and r in range.

One program walks over whole heads. For each block J of columns it meets the tiles of rows I from J on: sums of J stay
in registers, sums of I go to a scratch of the program's own, by reading, adding and writing. In the tile on the
diagonal the columns take all pairs, so only rows after J add to the scratch. No tile is met twice for one J, so no
address of the scratch is read in the inner loop that the same inner loop wrote; a barrier stands between the inner
loops, where other threads may read what was written. No atomics: the same bits from run to run.

A head is taken where its h and lse spread over no more than HEADROOM allows in both models, and where its tokens are
one interval that all of them see (no mask, padding), of more than one; `taken` tells the sweeps of _rows and _self,
launched behind, which heads are left to them.

G relations, B batch, R relation heads, N tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S padded.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._launch import Launch, group, lse_argument, shared_arguments
from minilm_kernels._triton._plan import Kind, whole
from minilm_kernels._triton._steps import (
    FLOOR,
    LN2,
    head_pointer,
    interval,
    load_lse,
    load_tokens,
    pick,
    store_lse,
    store_tokens,
    weight_of,
)

HEADROOM: tl.constexpr = tl.constexpr(60.0)


@triton.jit
def triangle_forward(
    x_t,  # ((pointers), strides) of G tensors (B, R, N, D_T)
    x_s,  # of G tensors (B, R, N, D_S)
    bounds,  # (4, B, N) or None
    row_weight,  # (pointer, strides) of (B, N), or None
    value,  # (G, B, R), Σ weight · KL of each head that is taken, else 0
    taken,  # (G, B, R)
    lse_t,  # (c + log2 l,) or (c, log2 l), each (G, B, R, N), or None
    lse_s,
    scratch,  # (programs, 3, N)
    scales,  # scale_t log2 e, scale_s log2 e, scale_s, weight
    G,
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
    WARPS: tl.constexpr,
):
    row_sums = scratch + tl.program_id(0).to(tl.int64) * 3 * N
    for turn in range(tl.cdiv(G * B * R - tl.program_id(0), tl.num_programs(0))):
        which = tl.program_id(0) + turn * tl.num_programs(0)
        head, batch, relation = which % R, which // R % B, which // R // B
        base_t, base_s = head_pointer(x_t, relation, batch, head), head_pointer(x_s, relation, batch, head)
        start, end, regular = _tokens(bounds, batch, B, N, BLOCK_M)
        low_t, high_t = _own_scores(x_t, base_t, start, end, D_T, DIM_T, BLOCK_M)
        low_s, high_s = _own_scores(x_s, base_s, start, end, D_S, DIM_S, BLOCK_M)
        c_t, c_s = (low_t + high_t) * (0.5 * scales[0]), (low_s + high_s) * (0.5 * scales[1])
        spread = tl.maximum((high_t - low_t) * scales[0], (high_s - low_s) * scales[1]) * 0.5
        regular = regular & (spread <= HEADROOM)
        tl.store(taken + which, regular.to(tl.int32))
        end = tl.where(regular, end, start)
        loss = tl.zeros([BLOCK_N], tl.float32)
        tl.debug_barrier()  # the last head's sums may still be read
        for n in range(start, end, BLOCK_M):
            offs = n + tl.arange(0, BLOCK_M)
            for sums in tl.static_range(3):
                tl.store(row_sums + sums * N + offs, tl.zeros([BLOCK_M], tl.float32), mask=offs < end)
        tl.debug_barrier()
        for n in range(start, end, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            key = offs_n < end
            key_t = load_tokens(x_t, base_t, n, key, D_T, DIM_T, BLOCK_N)
            key_s = load_tokens(x_s, base_s, n, key, D_S, DIM_S, BLOCK_N)
            l_t = _no_columns(BLOCK_N, WARPS)
            l_s, a = _no_columns(BLOCK_N, WARPS), _no_columns(BLOCK_N, WARPS)
            for m in range(n, end, BLOCK_M):
                offs_m = m + tl.arange(0, BLOCK_M)
                row = offs_m < end
                row_t = load_tokens(x_t, base_t, m, row, D_T, DIM_T, BLOCK_M)
                row_s = load_tokens(x_s, base_s, m, row, D_S, DIM_S, BLOCK_M)
                t = tl.dot(row_t, key_t.T, input_precision=PRECISION)
                s = tl.dot(row_s, key_s.T, input_precision=PRECISION)
                t = tl.fma(t, scales[0], tl.where(row, -c_t, FLOOR)[:, None])
                s = tl.fma(s, scales[1], tl.where(row, -c_s, FLOOR)[:, None])
                p, q = tl.exp2(t), tl.exp2(s)
                difference = p * (t - s)
                l_t += _columns(p, WARPS)
                l_s += _columns(q, WARPS)
                a += _columns(difference, WARPS)
                below = row & (offs_m >= n + BLOCK_N)
                _add(row_sums + offs_m, tl.sum(p, 1), below)
                _add(row_sums + N + offs_m, tl.sum(q, 1), below)
                _add(row_sums + 2 * N + offs_m, tl.sum(difference, 1), below)
            tl.debug_barrier()
            sum_t = _total(l_t) + tl.load(row_sums + offs_n, mask=key, other=0.0)
            sum_s = _total(l_s) + tl.load(row_sums + N + offs_n, mask=key, other=0.0)
            sum_a = _total(a) + tl.load(row_sums + 2 * N + offs_n, mask=key, other=0.0)
            weight = weight_of(row_weight, scales[3], batch, n, key, BLOCK_N)
            kl = LN2 * (sum_a / sum_t - tl.log2(sum_t) + tl.log2(sum_s))
            loss += tl.where(key, kl * weight, 0.0)
            if lse_t is not None:
                at = which.to(tl.int64) * N + offs_n
                store_lse(lse_t, at, key, key, c_t, sum_t)
                store_lse(lse_s, at, key, key, c_s, sum_s)
        tl.store(value + which, tl.sum(loss, 0))
        if lse_t is not None and regular:
            _store_no_lse(lse_t, lse_s, which.to(tl.int64) * N, 0, start, BLOCK_M)
            _store_no_lse(lse_t, lse_s, which.to(tl.int64) * N, end, N, BLOCK_M)


@triton.jit
def triangle_backward(
    x_t,  # ((pointers), strides) of G tensors (B, R, N, D_T)
    x_s,  # of G tensors (B, R, N, D_S)
    bounds,  # (4, B, N) or None
    row_weight,  # (pointer, strides) of (B, N), or None
    taken,  # (G, B, R)
    lse_t,  # as row_sweep or triangle_forward stores it
    lse_s,
    scratch,  # (programs, N, DIM_S)
    grad,  # of the weighted sum, one number
    relation_weights,
    dx,  # of G tensors (B, R, N, D_S)
    scales,  # scale_t log2 e, scale_s log2 e, scale_s, weight
    G,
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
    offs_d = tl.arange(0, DIM_S)
    row_sums = scratch + tl.program_id(0).to(tl.int64) * N * DIM_S
    for turn in range(tl.cdiv(G * B * R - tl.program_id(0), tl.num_programs(0))):
        which = tl.program_id(0) + turn * tl.num_programs(0)
        head, batch, relation = which % R, which // R % B, which // R // B
        base_t, base_s = head_pointer(x_t, relation, batch, head), head_pointer(x_s, relation, batch, head)
        gradient_pointer = head_pointer(dx, relation, batch, head)
        start, end, regular = _tokens(bounds, batch, B, N, BLOCK_M)
        at = which.to(tl.int64) * N
        low_t, high_t = _extremes(lse_t, at, start, end, BLOCK_M)
        low_s, high_s = _extremes(lse_s, at, start, end, BLOCK_M)
        c_t, c_s = 0.5 * (low_t + high_t), 0.5 * (low_s + high_s)
        regular = regular & (tl.maximum(high_t - low_t, high_s - low_s) <= 2 * HEADROOM)
        tl.store(taken + which, regular.to(tl.int32))
        end = tl.where(regular, end, start)
        own = tl.load(grad) * pick(relation_weights, relation) * scales[2]
        tl.debug_barrier()  # the last head's sums may still be read
        for n in range(start, end, BLOCK_M):
            offs = n + tl.arange(0, BLOCK_M)
            pointers = row_sums + offs[:, None] * DIM_S + offs_d[None, :]
            tl.store(pointers, tl.zeros([BLOCK_M, DIM_S], tl.float32), mask=(offs < end)[:, None])
        tl.debug_barrier()
        for n in range(start, end, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            key = offs_n < end
            key_t = load_tokens(x_t, base_t, n, key, D_T, DIM_T, BLOCK_N)
            key_s = load_tokens(x_s, base_s, n, key, D_S, DIM_S, BLOCK_N)
            key_r_t, key_r_s = _reciprocal(lse_t, at + offs_n, key, c_t), _reciprocal(lse_s, at + offs_n, key, c_s)
            sums = tl.zeros([BLOCK_N, DIM_S], tl.float32)
            for m in range(n, end, BLOCK_M):
                offs_m = m + tl.arange(0, BLOCK_M)
                row = offs_m < end
                row_t = load_tokens(x_t, base_t, m, row, D_T, DIM_T, BLOCK_M)
                row_s = load_tokens(x_s, base_s, m, row, D_S, DIM_S, BLOCK_M)
                t = tl.dot(row_t, key_t.T, input_precision=PRECISION)
                s = tl.dot(row_s, key_s.T, input_precision=PRECISION)
                r_t, r_s = _reciprocal(lse_t, at + offs_m, row, c_t), _reciprocal(lse_s, at + offs_m, row, c_s)
                g = tl.exp2(tl.fma(s, scales[1], -c_s)) * (r_s[:, None] + key_r_s[None, :])
                g -= tl.exp2(tl.fma(t, scales[0], -c_t)) * (r_t[:, None] + key_r_t[None, :])
                g = g.to(row_s.dtype)
                sums = tl.dot(g.T, row_s, sums, input_precision=PRECISION)
                below = (row & (offs_m >= n + BLOCK_N))[:, None]
                pointers = row_sums + offs_m[:, None] * DIM_S + offs_d[None, :]
                _add(pointers, tl.dot(g, key_s, input_precision=PRECISION), below)
            tl.debug_barrier()
            sums += tl.load(row_sums + offs_n[:, None] * DIM_S + offs_d[None, :], mask=key[:, None], other=0.0)
            weight = weight_of(row_weight, scales[3], batch, n, key, BLOCK_N) * own
            store_tokens(dx, gradient_pointer, n, sums * weight[:, None], key, D_S, DIM_S, BLOCK_N)
        if regular:
            _store_zeros(dx, gradient_pointer, 0, start, D_S, DIM_S, BLOCK_M)
            _store_zeros(dx, gradient_pointer, end, N, D_S, DIM_S, BLOCK_M)


@triton.jit
def _tokens(bounds, batch, B, N, BLOCK: tl.constexpr):
    """First token, end of tokens, and whether they are several, all of which see all from the first to the end."""
    if bounds is None:
        return 0, N, N > 1
    else:
        low, high, count = tl.full([BLOCK], N, tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        shared_low, shared_high = high, low
        for n in range(0, N, BLOCK):
            first, end = interval(bounds, 0, batch, n, B, N, BLOCK)
            token = first < end
            low, high = tl.where(token, tl.minimum(low, first), low), tl.where(token, tl.maximum(high, end), high)
            shared_low = tl.where(token, tl.maximum(shared_low, first), shared_low)
            shared_high = tl.where(token, tl.minimum(shared_high, end), shared_high)
            count += token.to(tl.int32)
        start, end = tl.min(low, 0), tl.max(high, 0)
        regular = (tl.max(shared_low, 0) <= start) & (tl.min(shared_high, 0) >= end)
        return start, end, regular & (tl.sum(count, 0) == end - start) & (end > start + 1)


@triton.jit
def _own_scores(x, base, start, end, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The least and the largest x_i · x_i."""
    low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for n in range(start, end, BLOCK):
        token = n + tl.arange(0, BLOCK) < end
        tile = load_tokens(x, base, n, token, D, DIM, BLOCK).to(tl.float32)
        square = tl.sum(tile * tile, 1)
        low = tl.minimum(low, tl.where(token, square, float("inf")))
        high = tl.maximum(high, square)
    return tl.where(start < end, tl.min(low, 0), 0.0), tl.max(high, 0)


@triton.jit
def _extremes(lse, at, start, end, BLOCK: tl.constexpr):
    """The least and the largest lse of a head."""
    low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    for n in range(start, end, BLOCK):
        offs = n + tl.arange(0, BLOCK)
        first, second = load_lse(lse, at + offs, offs < end)
        low = tl.minimum(low, tl.where(offs < end, first + second, float("inf")))
        high = tl.maximum(high, tl.where(offs < end, first + second, float("-inf")))
    return tl.where(start < end, tl.min(low, 0), 0.0), tl.where(start < end, tl.max(high, 0), 0.0)


@triton.jit
def _reciprocal(lse, offs, token, c):
    """1 / l of the tokens."""
    high, low = load_lse(lse, offs, token)
    return tl.where(token, tl.exp2(c - high - low), 0.0)


@triton.jit
def _no_columns(BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    return tl.zeros([WARPS, 8, BLOCK_N], tl.float32)


@triton.jit
def _columns(tile, WARPS: tl.constexpr):
    """Sums of the rows that one thread holds of each column (warps have 16 rows, their threads two of each): what is
    left to add crosses threads, and waits for `_total`."""
    parts: tl.constexpr = tile.shape[0] // (16 * WARPS)
    return tl.sum(tl.sum(tl.reshape(tile, [parts, WARPS, 2, 8, tile.shape[1]]), 2), 0)


@triton.jit
def _total(columns):
    return tl.sum(tl.sum(columns, 1), 0)


@triton.jit
def _add(pointers, values, mask):
    tl.store(pointers, values + tl.load(pointers, mask=mask, other=0.0), mask=mask)


@triton.jit
def _store_no_lse(lse_t, lse_s, at, start, end, BLOCK: tl.constexpr):
    """What store_lse stores where there is no token."""
    for n in range(start, end, BLOCK):
        offs = n + tl.arange(0, BLOCK)
        for lse in tl.static_range(2):
            pair = lse_t if lse == 0 else lse_s
            tl.store(pair[0] + at + offs, tl.full([BLOCK], float("inf"), tl.float32), mask=offs < end)
            if len(pair) == 2:
                tl.store(pair[1] + at + offs, tl.zeros([BLOCK], tl.float32), mask=offs < end)


@triton.jit
def _store_zeros(dx, base, start, end, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    for n in range(start, end, BLOCK):
        zeros = tl.zeros([BLOCK, DIM], tl.float32)
        store_tokens(dx, base, n, zeros, n + tl.arange(0, BLOCK) < end, D, DIM, BLOCK)


class Walk(NamedTuple):
    """How programs walk over the heads."""

    block_m: int  # rows of a tile
    block_n: int  # columns
    num_warps: int
    num_stages: int
    residents: int  # programs for each multiprocessor


FORWARD = Walk(64, 64, 4, 2, 2)
BACKWARD = Walk(64, 64, 4, 2, 2)


def _programs(kind: Kind, walk: Walk) -> int:
    if kind.device.type != "cuda":
        return min(math.prod(kind.shape[:3]), walk.residents)
    processors = torch.cuda.get_device_properties(kind.device).multi_processor_count
    return min(math.prod(kind.shape[:3]), walk.residents * processors)


def triangle_forward_launch(
    relations: Relations, kind: Kind, taken: Tensor, lse_t: Tensor, lse_s: Tensor, walk: Walk | None = None
) -> Launch:
    walk = walk or FORWARD
    count = _programs(kind, walk)
    scratch = taken.new_empty((count, 3, kind.shape[3]), dtype=torch.float32)
    arguments = {
        **whole(kind),
        **shared_arguments(relations),
        "G": kind.shape[0],
        "value": taken.new_empty((kind.shape[0], math.prod(kind.shape[1:3])), dtype=torch.float32),
        "taken": taken,
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "scratch": scratch,
        "BLOCK_M": walk.block_m,
        "BLOCK_N": walk.block_n,
        "WARPS": min(walk.num_warps, walk.block_m // 16),
    }
    return Launch(triangle_forward, count, arguments, walk.num_warps, walk.num_stages)


def triangle_backward_launch(
    relations: Relations,
    kind: Kind,
    lse_t: Tensor,
    lse_s: Tensor,
    taken: Tensor,
    grad: Tensor,
    relation_weights: list[float],
    dx: list[Tensor],
    walk: Walk | None = None,
) -> Launch:
    walk = walk or BACKWARD
    count, constants = _programs(kind, walk), whole(kind)
    scratch = taken.new_empty((count, kind.shape[3], constants["DIM_S"]), dtype=torch.float32)
    arguments = {
        **constants,
        **shared_arguments(relations),
        "G": kind.shape[0],
        "taken": taken,
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "scratch": scratch,
        "grad": grad,
        "relation_weights": tuple(relation_weights),
        "dx": group(dx),
        "BLOCK_M": walk.block_m,
        "BLOCK_N": walk.block_n,
    }
    return Launch(triangle_backward, count, arguments, walk.num_warps, walk.num_stages)
