"""Steps that the kernels share.

A group of G tensors (B, R, N, d) of equal strides comes as one argument: ((pointer, ...), the four strides, the largest
power of two up to 16 that divides all but the last, and whether offsets within a tile need 64 bits).
Scores are in base 2 (log2 e is folded into their factor), because the hardware's exponential is. FLOOR stands for the
score of a key that is not allowed: finite, so that differences of two of them exist; exp2 of it is 0; a power of two,
so that its product with any factor is exact. Else, in a row that sees no key yet, `FLOOR · factor − max` as one fused
instruction would leave the rounding of `max`, up to 1e22, and the exponential of that.

G relations, B batch, R relation heads, N tokens, D dimension of a relation head, DIM its padded size, BLOCK tokens of a
tile.
"""

import triton
import triton.language as tl
from triton import knobs

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
FLOOR: tl.constexpr = tl.constexpr(-(2.0**100))
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def program(blocks, R, B):
    """(tile, head, batch, relation) of this program; the tiles of a head are neighbours and share its keys in cache."""
    pid = tl.program_id(0)
    rest = pid // blocks
    return pid % blocks, rest % R, rest // R % B, rest // R // B


@triton.jit
def pick(choices, which):
    """choices[which] for a number known only when the kernel runs."""
    chosen = choices[0]
    for i in tl.static_range(1, len(choices)):
        chosen = tl.where(which == i, choices[i], chosen)
    return chosen


@triton.jit
def head_pointer(x, relation, batch, head):
    return pick(x[0], relation) + tl.multiple_of(batch.to(tl.int64) * x[1] + head.to(tl.int64) * x[2], x[5])


@triton.jit
def tile_pointers(x, base, start, BLOCK: tl.constexpr, DIM: tl.constexpr, d=0):
    """Pointers (BLOCK, DIM) to the tokens from `start` on, dimensions from `d` on."""
    row, dimension = tl.arange(0, BLOCK), d + tl.arange(0, DIM)
    if x[6]:
        row, dimension = row.to(tl.int64), dimension.to(tl.int64)
    first, rows = tl.multiple_of(tl.cast(start, tl.int64) * x[3], x[5]), tl.multiple_of(row * x[3], x[5])
    return base + first + (rows[:, None] + (dimension * x[4])[None, :])


@triton.jit
def load_tokens(x, base, start, token, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, d=0):
    """The tokens from `start` on where `token` (None: all), else zeros: what stands behind a mask is never read.

    Of each the DIM dimensions from `d` on.
    """
    pointers = tile_pointers(x, base, start, BLOCK, DIM, d)
    if token is not None:
        tile = tl.load(pointers, mask=token[:, None] & (d + tl.arange(0, DIM) < D)[None, :], other=0.0)
    elif D % DIM == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(d + tl.arange(0, DIM) < D)[None, :], other=0.0)
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16, but float32 rightly
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tokens(x, base, start, values, inside, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, d=0):
    pointers = tile_pointers(x, base, start, BLOCK, DIM, d)
    mask = inside[:, None] & (d + tl.arange(0, DIM) < D)[None, :]
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def interval(bounds, which: tl.constexpr, batch, start, B, N, BLOCK: tl.constexpr):
    """First and end of what the tokens from `start` on may see; which: 0 the keys of a row, 2 the rows of a key."""
    offs = start + tl.arange(0, BLOCK)
    first = bounds + (which * B + batch).to(tl.int64) * N + offs
    end = bounds + ((which + 1) * B + batch).to(tl.int64) * N + offs
    return tl.load(first, mask=offs < N, other=0), tl.load(end, mask=offs < N, other=0)


@triton.jit
def visible_range(
    bounds, holes, which: tl.constexpr, batch, start, B, N, FILLED: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    """What the OWN tokens from `start` on may see. FILLED: N >= BLOCK.

    Returns (which of them are tokens, first and end of what each sees, start, full, end). What any of them sees lies in
    start..end. All that lies in start..full, whole tiles of BLOCK, is a token and seen by each of them.
    """
    inside = start + tl.arange(0, OWN) < N
    if bounds is None:
        zero = tl.zeros([OWN], tl.int32)
        full = N // BLOCK * BLOCK
        if FILLED:
            tl.assume(full > 0)  # a loop that may run zero times makes ptxas serialise its tensor-core instructions
        return inside, zero, zero + N, 0, full, N
    else:
        first, end = interval(bounds, which, batch, start, B, N, OWN)
        token = first < end
        low = tl.min(tl.where(token, first, N), 0)
        high = tl.max(tl.where(token, end, 0), 0)
        shared = tl.min(tl.where(token, end, N), 0)
        whole = tl.max(tl.where(token, first, 0), 0) == low
        if holes is not None:
            whole = whole & (tl.load(holes + batch) == 0)
        full = low + tl.where(whole, tl.maximum(shared - low, 0) // BLOCK * BLOCK, 0)
        return token, first, end, low, full, high


@triton.jit
def is_token(bounds, holes, batch, start, end, B, N, BLOCK: tl.constexpr):
    """Which of the tokens from `start` on, before `end`, are any; only a mask with holes has others among them."""
    offs = start + tl.arange(0, BLOCK)
    if holes is not None:
        key_first, key_end = interval(bounds, 0, batch, start, B, N, BLOCK)
        return (offs < end) & (key_first < key_end)
    else:
        return offs < end


@triton.jit
def weight_of(row_weight, weight, batch, start, inside, BLOCK: tl.constexpr):
    """Weight of the rows from `start` on; row_weight is None or (pointer, stride of batch, stride of tokens)."""
    if row_weight is None:
        return tl.full([BLOCK], 1.0, tl.float32) * weight
    else:
        offs = batch.to(tl.int64) * row_weight[1] + (start + tl.arange(0, BLOCK)) * row_weight[2]
        return tl.load(row_weight[0] + offs, mask=inside, other=0.0) * weight


@triton.jit
def log2_ratio(a, b):
    """log2(a / b) of positive numbers, with a small relative error where they are near each other.

    The hardware's logarithm errs by up to 2^-22 whatever its size, which is more than the loss of models that nearly
    agree. Near 1: ln r = 2 artanh z with z = (r − 1) / (r + 1), five terms of its series.
    """
    z = (a - b) / (a + b)
    square = z * z
    series = 1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0 + square * (1.0 / 9.0))))
    return tl.where(tl.abs(z) < 0.125, 2.0 / LN2 * z * series, tl.log2(a) - tl.log2(b))


@triton.jit
def store_lse(lse_t, lse_s, offs, token, inside, m_t, m_s, l_t, l_s, SQUARED: tl.constexpr):
    """References and factors (see `probability`) of rows whose sums relative to m are l.

    Two numbers of each model are m and 1 / l. A lone reference is m + log2 l, rounded, and what that adds multiplies P
    and Q by two numbers near 1. A factor of the teacher alone is their ratio, so that Q − P is exact up to one of them.
    It is squared for sweeps that add G_ij + G_ji and have no registers for the factor of row i: on the diagonal, where
    rows are one-hot, the square in one of the two serves both. References are stored with the other sign (before Triton
    3.9 a sign is an instruction an element in the sweeps), −inf where there is no token.
    """
    if len(lse_s) == 2:
        reference_t, reference_s = m_t, m_s
        tl.store(lse_t[1] + offs, 1.0 / l_t, mask=inside)
        tl.store(lse_s[1] + offs, 1.0 / l_s, mask=inside)
    else:
        reference_t, reference_s = m_t + tl.log2(l_t), m_s + tl.log2(l_s)
        if len(lse_t) == 2:
            factor = (tl.exp2(reference_t - m_t) / l_t) / (tl.exp2(reference_s - m_s) / l_s)
            tl.store(lse_t[1] + offs, factor * factor if SQUARED else factor, mask=inside)
    tl.store(lse_t[0] + offs, tl.where(token, -reference_t, float("-inf")), mask=inside)
    tl.store(lse_s[0] + offs, tl.where(token, -reference_s, float("-inf")), mask=inside)


@triton.jit
def load_lse(lse, offs, token):
    """What `store_lse` stored of rows where `token` (None: all): −reference and factor, or the first alone."""
    negative = load(lse[0] + offs, token)
    if len(lse) == 1:
        return (negative,)
    else:
        return negative, load(lse[1] + offs, token)


@triton.jit
def load_own_lse(lse_t, lse_s, offs, token):
    """`load_lse` of both models, of rows that stay through a main loop: without a factor of the teacher alone."""
    if len(lse_s) == 2:
        return load_lse(lse_t, offs, token), load_lse(lse_s, offs, token)
    else:
        own_t, own_s = load(lse_t[0] + offs, token), load(lse_s[0] + offs, token)
        return (own_t, tl.zeros_like(own_t) + 1.0), (own_s, tl.zeros_like(own_s) + 1.0)


@triton.jit
def load(pointers, token):
    """What the pointers show where `token` (None: everywhere), zeros elsewhere."""
    if token is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=token, other=0.0)


@triton.jit
def tokens(x, base, start, token, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens as `products` takes them: loaded, or if D > DIM where they lie, to be loaded in parts of DIM."""
    if D > DIM:
        return base, start
    else:
        return load_tokens(x, base, start, token, D, DIM, BLOCK)


@triton.jit
def products(
    own, others, x, y, own_token, token,
    D: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products (OWN, BLOCK) of own `tokens` of x and others of y."""
    if D > DIM:
        total = tl.zeros([OWN, BLOCK], tl.float32)
        for d in range(0, D, DIM):
            own_part = load_tokens(x, own[0], own[1], own_token, D, DIM, OWN, d)
            other_part = load_tokens(y, others[0], others[1], token, D, DIM, BLOCK, d)
            total = tl.dot(own_part, other_part.T, total, input_precision=PRECISION)
        return total
    else:
        return tl.dot(own, others.T, input_precision=PRECISION)


@triton.jit
def scores(
    own_t, own_s, own_token, x_t, x_s, y_t, y_s, base_t, base_s, start, token, first, end,
    D_T: tl.constexpr, D_S: tl.constexpr, DIM_T: tl.constexpr, DIM_S: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of a program's own `tokens` of x with a tile of others of y from `start` on, and the student's tile.

    token is None where each own token sees the whole tile; else FLOOR stands where an other is not `token` or lies
    outside first..end.
    """
    tile_t = tokens(y_t, base_t, start, token, D_T, DIM_T, BLOCK)
    tile_s = tokens(y_s, base_s, start, token, D_S, DIM_S, BLOCK)
    allowed = None
    if token is not None:
        offs = start + tl.arange(0, BLOCK)
        allowed = token[None, :] & (offs[None, :] >= first[:, None]) & (offs[None, :] < end[:, None])
    t = products(own_t, tile_t, x_t, y_t, own_token, token, D_T, DIM_T, PRECISION, OWN, BLOCK)
    if allowed is not None:
        t = tl.where(allowed, t, FLOOR)
    s = products(own_s, tile_s, x_s, y_s, own_token, token, D_S, DIM_S, PRECISION, OWN, BLOCK)
    if allowed is not None:
        s = tl.where(allowed, s, FLOOR)
    return t, s, tile_s


@triton.jit
def exponential(products, scale, negative, AXIS: tl.constexpr):
    """2^(score − reference), −reference along the other axis.

    The score is rounded once, relative to the reference: by name, so that all sweeps and their tails agree.
    """
    return tl.exp2(tl.fma(products, scale, tl.expand_dims(negative, AXIS)))


@triton.jit
def probability(products, scale, lse, AXIS: tl.constexpr):
    """factor · 2^(score − reference), lse what `load_lse` gives of the rows, along the other axis."""
    p = exponential(products, scale, lse[0], AXIS)
    if len(lse) == 1:
        return p
    else:  # a factor of 1 would be multiplied by before Triton 3.9
        return p * tl.expand_dims(lse[1], AXIS)
