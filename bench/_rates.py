"""The three rates of a CUDA device that bound the loss: of a copy, a matrix product, exponentials in registers."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from _floor import Rates
from _measure import Work, time_ms

COPY_BYTES = 1 << 30  # many times any second-level cache
PRODUCT = 8192  # rows and columns
EXP_BLOCK, EXP_STEPS = 1024, 4096


@triton.jit
def _exp2_chains(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK chains x ← 2^(−x) for each program: exponentials and nothing else."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = offsets.to(tl.float32) * 1e-9
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out + offsets, x)


def measure_rates(dtype: torch.dtype) -> Rates:
    """Bytes, floating-point operations of a product in `dtype`, and exponentials, each per second."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    # Random values: products of zeros run faster than any real data.
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda").to(dtype) for _ in range(2))
    product = _seconds(lambda: a @ b)
    programs = 16 * torch.cuda.get_device_properties("cuda").multi_processor_count
    out = torch.empty(programs * EXP_BLOCK, device="cuda")
    exps = _seconds(lambda: _exp2_chains[(programs,)](out, STEPS=EXP_STEPS, BLOCK=EXP_BLOCK, num_warps=4))
    return Rates(2 * COPY_BYTES / copy, 2 * PRODUCT**3 / product, out.numel() * EXP_STEPS / exps)


def _seconds(run: Callable[[], Any]) -> float:
    return time_ms([Work(lambda _: run())], "cuda")[0].p50 / 1e3
