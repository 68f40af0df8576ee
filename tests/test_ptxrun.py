"""The interpreter of compiled code itself: arithmetic against fractions, small kernels, faults that it must find."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by Triton, which is for Linux")

import sample_kernels as samples
from ptxrun.arithmetic import exp2, fma, log2, multiply_tiles, reciprocal, to_bfloat16, to_float16
from ptxrun.memory import Fault

Run = Callable[..., Any]


def nearest(x: Fraction) -> np.float32:
    """The float32 nearest to a fraction, ties to even."""
    guess = np.float32(float(x))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda y: (abs(Fraction(float(y)) - x), int(np.float32(y).view(np.uint32)) & 1))


def test_fma_rounds_once() -> None:
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(4000).astype(np.float32) for _ in range(3))
    c[:1000] *= np.float32(2.0**-30)
    c[1000:1500] = -(a * b)[1000:1500]
    # a b on a tie of float32, c far below float64's last place
    a[2000:3000] = b[2000:3000] = 1 + np.float32(2.0**-12)
    c[2000:3000] *= np.float32(2.0**-80)
    scale = np.float32(2.0**-100)
    a[3000:], c[3000:] = a[3000:] * scale * np.float32(2.0**-30), c[3000:] * scale * np.float32(2.0**-32)  # subnormal
    exact = [
        nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert (fma(a, b, c) == np.array(exact)).all()
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != np.array(exact)).any()  # these operands tell one rounding from two


@pytest.mark.parametrize(("dtype", "convert"), [(torch.bfloat16, to_bfloat16), (torch.float16, to_float16)])
def test_conversions_are_pytorchs(dtype: torch.dtype, convert: Callable[[np.ndarray], np.ndarray]) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:70_000] = bits[:70_000] & 0x0FFFFFFF | 0x30000000  # sizes that float16 has
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        assert (convert(x) == torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)).all()


def test_approximate_instructions_err_by_what_the_manual_allows() -> None:
    x = np.random.default_rng(2).uniform(0.1, 20, 10_000).astype(np.float32)
    for function, exact, bound in ((exp2, np.exp2, 2**-22.5), (reciprocal, np.reciprocal, 2**-23)):
        error = np.abs(function(x) / exact(x.astype(np.float64)) - 1)
        assert 0.9 * bound < error.max() < bound + 2**-24
        assert (function(x) == function(x)).all()
    near = x[(x > 0.5) & (x < 2)]
    error = np.abs(log2(near) - np.log2(near.astype(np.float64)))
    assert 0.9 * 2**-22 < error.max() < 2**-22 + 2**-25
    one = np.ones(1, np.float32)
    assert (exp2(0 * one), log2(one), reciprocal(one)) == (1, 0, 1)


def test_products_of_tiles_are_cut_off() -> None:
    random = np.random.default_rng(3)
    a, b = (random.standard_normal(s).astype(np.float16).astype(np.float32) for s in ((16, 16), (16, 8)))
    exact = a.astype(np.float64) @ b
    cut = multiply_tiles(a, b, np.zeros((16, 8), np.float32))
    assert 0 < np.abs(cut - exact).max() < 16 * 2.0**-24 * np.abs(exact).max() * 4
    ones = np.ones((16, 16), np.float32)
    assert (multiply_tiles(ones, ones[:, :8], ones[:, :8]) == 17).all()


def test_elements(compiled: Run) -> None:
    compiled(samples.sums, {})
    compiled(samples.loops)


@pytest.mark.parametrize(
    ("dtype", "precision", "most"),
    [
        (torch.bfloat16, "ieee", 2e-6),
        (torch.float16, "ieee", 2e-6),
        (torch.float32, "ieee", 2e-6),
        (torch.float32, "tf32", 4e-3),
    ],
)
def test_products(dtype: torch.dtype, precision: str, most: float, compiled: Run) -> None:
    assert 0 < compiled(samples.error_of_product, dtype, precision, (100, 72, 50)) < most


def test_reads_and_writes_outside_of_a_tensor_are_found(compiled: Run) -> None:
    with pytest.raises(Fault, match="read of 4 bytes outside of x"):
        compiled(samples.sums, {"x": 500})
    with pytest.raises(Fault, match="write of 4 bytes outside of z"):
        compiled(samples.sums, {}, 2)


@pytest.mark.parametrize(("lanes", "fault"), [(8192, "two threads wrote different values"), (128, "another program")])
def test_two_writers_of_one_place_are_found(lanes: int, fault: str, compiled: Run) -> None:
    with pytest.raises(Fault, match=fault):
        compiled(samples.writes_to_one_place, lanes)


@pytest.mark.parametrize("pattern", [r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\w+;"])
def test_missing_barriers_and_waits_are_found(pattern: str, compiled: Run) -> None:
    count, found = compiled(samples.without, pattern)
    assert count > 0
    assert found > 0
