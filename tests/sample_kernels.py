"""Small kernels for test_ptxrun.py: right ones against PyTorch, and wrong ones whose faults must be found."""

import re
from typing import Any

import torch
import triton
import triton.language as tl
from ptxrun.driver import Device
from ptxrun.memory import Fault
from ptxrun.program import parse
from ptxrun.translate import translate


@triton.jit
def add(x, y, z, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + offs, tl.load(x + offs, mask=offs < n) + tl.load(y + offs, mask=offs < n), mask=offs < n)


@triton.jit
def loop(x, z, counts, BLOCK: tl.constexpr):
    """Programs that loop different numbers of times."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(counts + tl.program_id(0))):
        total += tl.load(x + i * BLOCK + offs)
    tl.store(z + tl.program_id(0) * BLOCK + offs, total)


@triton.jit
def same_place(x, z):
    tl.store(z, tl.load(x + tl.program_id(0)))


@triton.jit
def multiply(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.program_id(0) % tl.cdiv(M, BM) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) // tl.cdiv(M, BM) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        offs = k + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * K + offs[None, :], mask=(rows[:, None] < M) & (offs[None, :] < K), other=0.0)
        mask = (columns[None, :] < N) & (offs[:, None] < K)
        y = tl.load(b + offs[:, None] * N + columns[None, :], mask=mask, other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], total, mask=mask)


def sums(lengths: dict[str, int], step: int = 1) -> None:
    """x + y of 1000 numbers; `lengths` of the tensors, z with a stride."""
    x, y = (torch.randn(lengths.get(name, 1000)) for name in "xy")
    z = torch.full((1000 * step,), torch.nan)[::step]
    Device(80).launch(add, 4, {"x": x, "y": y, "z": z, "n": 1000, "BLOCK": 256})
    assert torch.equal(z, x + y)


def writes_to_one_place(lanes: int) -> None:
    device = Device(80)
    device.schedule = device.schedule._replace(lanes=lanes)
    device.launch(same_place, 2, {"x": torch.randn(2), "z": torch.empty(1)})


def loops() -> None:
    counts, x = torch.tensor([3, 0, 5, 1], dtype=torch.int32), torch.randn(5, 128)
    z = torch.full((4, 128), torch.nan)
    Device(80).launch(loop, 4, {"x": x, "z": z, "counts": counts, "BLOCK": 128})
    for row, count in zip(z, counts, strict=True):
        torch.testing.assert_close(row, x[:count].sum(0))


def product(device: Device, dtype: torch.dtype, precision: str, shape: tuple[int, int, int]) -> float:
    """Error of a product of two matrices relative to the exact one."""
    m, n, k = shape
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    c = torch.full((m, n), torch.nan)
    arguments: dict[str, Any] = {"a": a, "b": b, "c": c, "M": m, "N": n, "K": k}
    arguments |= {"BM": 64, "BN": 32, "BK": 16, "PRECISION": precision}
    device.launch(multiply, -(-m // 64) * -(-n // 32), arguments, num_warps=4, num_stages=3)
    exact = a.double() @ b.double()
    return ((c - exact).norm() / exact.norm()).item()


def error_of_product(dtype: torch.dtype, precision: str, shape: tuple[int, int, int]) -> float:
    return product(Device(80), dtype, precision, shape)


def without(pattern: str) -> tuple[int, int]:
    """How many instructions match in a product's code, and without how many of them, one at a time, it goes wrong."""
    device = Device(80)
    product(device, torch.bfloat16, "ieee", (64, 32, 96))
    ((key, ready),) = device._ready.items()
    matches = list(re.finditer(pattern, ready.ptx))
    found = 0
    for match in matches:
        program = parse(ready.ptx[: match.start()] + ready.ptx[match.end() :])
        device._ready[key] = ready._replace(program=program, blocks=translate(program))
        try:
            error = product(device, torch.bfloat16, "ieee", (64, 32, 96))
        except Fault:
            found += 1
        else:
            found += not error < 1e-5
    return len(matches), found
