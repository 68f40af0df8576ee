"""What the instructions compute. Arrays of lanes in, arrays of lanes out.

fma, conversions and sums are rounded once, as on a GPU. Approximate instructions err by up to what PTX's manual allows,
and products of tiles by what tensor cores were measured to: a kernel must stay exact enough on the worst of GPUs.
"""

import numpy as np

F2, F4, F8 = np.float16, np.float32, np.float64
SMALLEST = np.float32(2.0**-126)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c in float32, rounded once.

    The product is exact in float64. Rounding the sum twice goes wrong only where float64 lies on a tie of float32 (its
    last 28 bits are zero) and is itself rounded: there one unit of float64 towards the exact sum decides.
    """
    product = a.astype(F8) * b
    total = product + c
    tie = (total.view(np.int64) & 0x0FFFFFFF) == 0
    if tie.any():
        back = total - product
        lost = (product - (total - back)) + (c - back)
        tie &= np.abs(lost) > 0  # false for NaN
        if tie.any():
            bits = total.view(np.int64)
            bits[tie] += np.where((lost[tie] > 0) == (total[tie] > 0), 1, -1)
    return total.astype(F4)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(F4(0), x), x)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits, rounded to nearest even; every NaN becomes 0x7FFF."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(F4)


def to_float16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(F2).view(np.uint16))


def from_float16(bits: np.ndarray) -> np.ndarray:
    return bits.view(F2).astype(F4)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of a number and NaN, the number; +0 is above -0."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -maximum(-a, -b)


def _off(*operands: np.ndarray) -> np.ndarray:
    """A number in [-1, 1) that follows from the operands' bits, so that the same operands err alike."""
    mixed = np.uint32(2654435761)
    for operand in operands:
        mixed = (operand.view(np.uint32) ^ mixed) * np.uint32(0x9E3779B1)
        mixed = mixed ^ (mixed >> np.uint32(15))
    return mixed * 2.0**-31 - 1


def _err(exact: np.ndarray, bound: float, *operands: np.ndarray) -> np.ndarray:
    """The exact result off by up to `bound` of itself; less around 1, where a GPU's tables begin, and not at 1."""
    share = np.minimum(1, 64 * np.abs(exact - 1))
    return (exact * (1 + share * bound * _off(*operands))).astype(F4)


def exp2(x: np.ndarray) -> np.ndarray:
    return _err(np.exp2(x.astype(F8)), 2**-22.5, x)


def log2(x: np.ndarray) -> np.ndarray:
    """Off by up to 2^-22, of itself where the operand is outside of (1/2, 2)."""
    exact = np.log2(x.astype(F8))
    size = np.where(np.abs(exact) < 1, exact != 0, np.abs(exact))
    return (exact + np.where(np.isfinite(size), size * 2**-22 * _off(x), 0)).astype(F4)


def reciprocal(x: np.ndarray) -> np.ndarray:
    return _err(1 / x.astype(F8), 2**-23, x)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _err(x.astype(F8) / y, 2**-22, x, y)


def multiply_tiles(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a b for a (..., m, k), b (..., k, n) of exact float32 and c (..., m, n) in float32, as tensor cores do it.

    As measured on them (Fasi et al. 2021): in steps of 8 products of 2 bytes (4 of 4), each term is cut off one bit
    below the last place of the largest, and the sum is cut off to float32.
    """
    step = 8 if a.shape[-1] == 16 else 4
    a, b = np.moveaxis(a.astype(F8), -1, 0), np.moveaxis(b.astype(F8), -2, 0)
    terms = np.empty((step + 1, *c.shape), F8)
    for k in range(0, len(a), step):
        np.multiply(a[k : k + step, ..., None], b[k : k + step, ..., None, :], out=terms[:step])
        terms[step] = c
        _, exponent = np.frexp(np.maximum.reduce(np.abs(terms)))
        terms *= np.ldexp(1.0, 25 - exponent)
        total = np.add.reduce(np.trunc(terms, out=terms)) * np.ldexp(1.0, exponent - 25)
        c = (total.view(np.int64) & -(1 << 29)).view(F8).astype(F4)  # 24 bits of the number are left
    return c
