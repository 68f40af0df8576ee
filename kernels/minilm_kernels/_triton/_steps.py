"""Steps that the kernels share. A tensor (B, R, N, d) comes as one argument: (pointer, its four strides).

Scores are in base 2 (log2 e is folded into their factor), because the hardware's exponential is. FLOOR stands for the
score of a key that is not allowed: finite, so that differences of two of them exist, and exp2 of it is 0.

B batch, R relation heads, N tokens, d dimension of a relation head, DIM its padded size, BLOCK tokens of a tile.
"""

import triton
import triton.language as tl
from triton import knobs

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634
FLOOR: tl.constexpr = tl.constexpr(-1e30)
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def head_pointer(x, batch, head):
    return x[0] + batch.to(tl.int64) * x[1] + head.to(tl.int64) * x[2]


@triton.jit
def tile_pointers(x, base, start, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Pointers (BLOCK, DIM) to the tokens from `start` on; only `start` needs 64 bits."""
    offs_n, offs_d = tl.arange(0, BLOCK), tl.arange(0, DIM)
    return base + tl.cast(start, tl.int64) * x[3] + (offs_n[:, None] * x[3] + offs_d[None, :] * x[4])


@triton.jit
def load_tile(x, base, start, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """All BLOCK tokens from `start` on."""
    pointers = tile_pointers(x, base, start, BLOCK, DIM)
    if D == DIM:
        return _for_dot(tl.load(pointers))
    else:
        return _for_dot(tl.load(pointers, mask=(tl.arange(0, DIM) < D)[None, :], other=0.0))


@triton.jit
def load_tokens(x, base, start, token, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens from `start` on where `token`, zeros elsewhere: what stands behind a mask is never read."""
    pointers = tile_pointers(x, base, start, BLOCK, DIM)
    return _for_dot(tl.load(pointers, mask=token[:, None] & (tl.arange(0, DIM) < D)[None, :], other=0.0))


@triton.jit
def store_tokens(x, base, start, values, inside, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    pointers = tile_pointers(x, base, start, BLOCK, DIM)
    mask = inside[:, None] & (tl.arange(0, DIM) < D)[None, :]
    tl.store(pointers, values.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def _for_dot(tile):
    """The interpreter multiplies the bit patterns of bfloat16; there every tile is float32."""
    if INTERPRETED:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def interval(bounds, which: tl.constexpr, batch, start, B, N, BLOCK: tl.constexpr):
    """First and end of the allowed partners of the tokens from `start` on; which: 0 keys of a row, 2 rows of a key."""
    offs = start + tl.arange(0, BLOCK)
    first = bounds + (which * B + batch).to(tl.int64) * N + offs
    end = bounds + ((which + 1) * B + batch).to(tl.int64) * N + offs
    return tl.load(first, mask=offs < N, other=0), tl.load(end, mask=offs < N, other=0)


@triton.jit
def common_range(first, end, holes, batch, N, BLOCK: tl.constexpr):
    """(start, full, end): every partner of a tile lies in start..end, and start..full, whole tiles, is allowed for all."""
    has = first < end
    start = tl.min(tl.where(has, first, N), 0)
    last = tl.max(tl.where(has, end, 0), 0)
    same_start = tl.max(tl.where(has, first, 0), 0) == start
    shared = tl.min(tl.where(has, end, N), 0)
    if holes is not None:
        same_start = same_start & (tl.load(holes + batch) == 0)
    full = tl.where(same_start, tl.maximum(shared - start, 0) // BLOCK * BLOCK, 0)
    return start, start + full, last
