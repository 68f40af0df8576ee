"""One launch of a kernel: what it is called with, on which grid, and with which options.

G relations, B batch, R relation heads, N tokens.
"""

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._plan import Problem

LOG2_E = 1.4426950408889634
LARGEST_TILE = 128, 1024  # tokens and dimensions that a kernel points to at once, at most
_DIVISORS = {n: tl.constexpr(n) for n in (1, 2, 4, 8, 16)}
_OFFSETS_NEED_64_BITS = {needs: tl.constexpr(needs) for needs in (False, True)}


@dataclass(frozen=True, eq=False)
class Schedule:
    """What all launches of a kernel over equal layouts share."""

    kernel: Any
    programs: int
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @cached_property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"maxnreg": self.max_registers} if self.max_registers else options


class Launch(NamedTuple):
    schedule: Schedule
    operands: dict[str, Any]  # tensors, and numbers that change from call to call

    @property
    def arguments(self) -> dict[str, Any]:
        return self.schedule.constants | self.operands

    def run(self, device: torch.device) -> None:
        """Triton launches on the current device, which need not be the tensors' own."""
        schedule = self.schedule
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            schedule.kernel[(schedule.programs,)](**schedule.constants, **self.operands, **schedule.options)


def group(tensors: Any) -> tuple[Any, ...] | None:
    """Tensors of equal strides as one kernel argument, see `_steps`."""
    return (tuple(tensors), *_strides(tensors[0].stride())) if tensors else None


@lru_cache(maxsize=1024)
def _strides(strides: tuple[int, ...]) -> tuple[Any, ...]:
    """The strides, and a power of two that divides all but the last.

    Triton itself asks only whether a stride is a multiple of 16. It would load each number of a head of 8 dimensions
    alone, and not ahead of its use.
    """
    farthest = LARGEST_TILE[0] * strides[2] + LARGEST_TILE[1] * strides[3]
    return *strides, _DIVISORS[math.gcd(16, *strides[:3])], _OFFSETS_NEED_64_BITS[farthest >= 2**31]


def row_weights(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x, *x.stride())


def shared_arguments(relations: Relations, completes: bool = False) -> dict[str, object]:
    """What all kernels with scores get, beside the constants; completes: whether gradients become whole."""
    scale, waits = relations.gradient_scales
    weight = relations.weight * waits if completes else relations.weight
    return {
        "x_t": group(relations.x_t),
        "x_s": group(relations.x_s),
        "bounds": relations.bounds,
        "row_weight": row_weights(relations.row_weight),
        "scales": (relations.scale_t * LOG2_E, relations.scale_s * LOG2_E, scale, weight),
    }


def row_gradients(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient of the weighted sum, or those of the rows over the largest, and that as `unit`."""
    if problem.reduces:
        return grad, None
    unit = grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return (grad / unit).contiguous(), unit


def value_buffer(relations: Relations, problem: Problem, programs: int) -> Tensor:
    """Uninitialised, for the losses that the kernels store: one a program, or one a row."""
    shape = (problem.shape[0], programs // problem.shape[0]) if problem.reduces else problem.shape
    return relations.x_s[0].new_empty(shape, dtype=torch.float32)
