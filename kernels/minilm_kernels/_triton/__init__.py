"""Launches of the Triton kernels: what the ops `minilm_kernels::triton_{forward,backward}` run.

B batch, R relation heads, N tokens, d dimension of a relation head.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from minilm_kernels._triton._keys import _key_sweep
from minilm_kernels._triton._rows import _row_sweep
from minilm_kernels._triton._steps import LOG2_E


def allocate_forward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    scale_t: float,
    scale_s: float,
    needs_gradient: bool,
    prepare: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows (B, R, N); with gradient also both lse, and dX of unit weight in the student's dtype."""
    rows = x_s.new_empty(x_s.shape[:3], dtype=torch.float32)
    nothing = rows.new_empty(0)
    if not needs_gradient:
        return rows, nothing, rows.new_empty(0), x_s.new_empty(0), x_s.new_empty(0)
    return rows, torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(x_s), x_s.new_empty(0)


def forward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    scale_t: float,
    scale_s: float,
    needs_gradient: bool,
    prepare: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fills what `allocate_forward` makes."""
    outputs = allocate_forward(x_t, y_t, x_s, y_s, bounds, holes, scale_t, scale_s, needs_gradient, prepare)
    rows, lse_t, lse_s, dx, _ = outputs
    y_t, y_s = x_t if y_t is None else y_t, x_s if y_s is None else y_s
    batch, heads, length, _ = x_s.shape
    plan = _plan(x_t, x_s)
    grid = (triton.cdiv(length, plan["BLOCK_M"]) * heads * batch,)
    with _on_device(x_s):
        _row_sweep[grid](
            *(_argument(x) for x in (x_t, y_t, x_s, y_s)),
            bounds,
            holes,
            (rows, lse_t, lse_s),
            _argument(dx) if needs_gradient else None,
            (scale_t * LOG2_E, scale_s * LOG2_E, scale_s),
            batch,
            heads,
            length,
            **plan,
        )
    return outputs


def allocate_backward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    lse_t: Tensor,
    lse_s: Tensor,
    dx: Tensor,
    dy: Tensor,
    weight: Tensor,
    scale_t: float,
    scale_s: float,
    along_sequence: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_s), x_s.new_empty(0) if y_s is None else torch.empty_like(y_s)


def backward(
    x_t: Tensor,
    y_t: Tensor | None,
    x_s: Tensor,
    y_s: Tensor | None,
    bounds: Tensor | None,
    holes: Tensor | None,
    lse_t: Tensor,
    lse_s: Tensor,
    dx: Tensor,
    dy: Tensor,
    weight: Tensor,  # (B, R, N)
    scale_t: float,
    scale_s: float,
    along_sequence: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ weight · row loss; for a self relation the first is the whole gradient."""
    unit_dx = dx
    outputs = allocate_backward(
        x_t, y_t, x_s, y_s, bounds, holes, lse_t, lse_s, dx, dy, weight, scale_t, scale_s, along_sequence
    )
    dx, dy = outputs
    is_self = y_s is None
    y_t, y_s = x_t if y_t is None else y_t, x_s if y_s is None else y_s
    batch, heads, length, _ = x_s.shape
    unit = torch.ones((), device=weight.device)
    if not along_sequence:
        unit = weight.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        weight = weight / unit
    plan = _plan(x_t, x_s)
    grid = (triton.cdiv(length, plan["BLOCK_N"]) * heads * batch,)
    with _on_device(x_s):
        _key_sweep[grid](
            *(_argument(x) for x in (x_t, y_t, x_s, y_s)),
            bounds,
            holes,
            lse_t,
            lse_s,
            _argument(weight),
            unit,
            _argument(unit_dx),
            _argument(dx),
            None if is_self else _argument(dy),
            (scale_t * LOG2_E, scale_s * LOG2_E, scale_s),
            batch,
            heads,
            length,
            ALONG_SEQUENCE=along_sequence,
            **plan,
        )
    return outputs


def _argument(x: Tensor) -> tuple[Any, ...]:
    return (x, *x.stride())


def _plan(x_t: Tensor, x_s: Tensor) -> dict[str, Any]:
    """Tile sizes and launch options."""
    d_t, d_s = x_t.shape[3], x_s.shape[3]
    dim_t, dim_s = (max(16, triton.next_power_of_2(d)) for d in (d_t, d_s))
    wide = max(dim_t, dim_s) * (4 if torch.float32 in (x_t.dtype, x_s.dtype) else 2)
    block = 64 if wide <= 256 else 32 if wide <= 512 else 16
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D_T": d_t,
        "D_S": d_s,
        "DIM_T": dim_t,
        "DIM_S": dim_s,
        "PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_M": block,
        "BLOCK_N": block,
        "num_warps": 4,
        "num_stages": 2,
    }


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
