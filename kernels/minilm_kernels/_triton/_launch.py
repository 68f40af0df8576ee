"""One launch of a kernel: what it is called with, on which grid, and with which options.

G relations, B batch, R relation heads, N tokens.
"""

import contextlib
import math
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


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"maxnreg": self.max_registers} if self.max_registers else options

    def run(self, device: torch.device) -> None:
        """Triton launches on the current device, which need not be the tensors' own."""
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def group(tensors: Any) -> tuple[Any, ...] | None:
    """Tensors of equal strides as one kernel argument, see `_steps`.

    Triton itself asks only whether a stride is a multiple of 16. It would load each number of a head of 8 dimensions
    alone, and not ahead of its use.
    """
    if not tensors:
        return None
    strides = tensors[0].stride()
    farthest = LARGEST_TILE[0] * strides[2] + LARGEST_TILE[1] * strides[3]
    return tuple(tensors), *strides, _DIVISORS[math.gcd(16, *strides[:3])], _OFFSETS_NEED_64_BITS[farthest >= 2**31]


def row_weights(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x, *x.stride())


def lse_argument(lse: Tensor) -> tuple[Any, ...] | None:
    """Logarithms of the softmax sums (parts, G, B, R, N), parts apart. (Triton 3.6 takes no None inside a tuple.)"""
    return (lse,) if lse.shape[0] == 1 else tuple(lse.unbind(0)) or None


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
