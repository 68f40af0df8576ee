"""One relation as an autograd Function over the registered ops; the student's tensors get gradients, nothing else does.

The weight of a row is either known beforehand and equal along each sequence (the scalar reductions: then everything is
linear in it, and the ops may prepare gradients of unit weight in the forward), or comes with the gradient of the rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from minilm_kernels import _ops
from minilm_kernels._allowed import Allowed


def relation_op(
    x_t: Tensor,  # (B, R, N, d_T)
    y_t: Tensor,
    x_s: Tensor,  # (B, R, N, d_S)
    y_s: Tensor,
    allowed: Allowed,
    row_weight: Tensor | None,  # (B or 1, 1, N or 1), equal along each sequence
    scale_t: float,
    scale_s: float,
    implementation: str,
) -> Tensor:
    """Σ row_weight · row loss, a scalar; or the row losses (B, R, N) without row_weight."""
    needs_gradient = torch.is_grad_enabled() and (x_s.requires_grad or y_s.requires_grad)
    is_self = y_t is x_t and y_s is x_s
    loss: Tensor = _Relation.apply(
        x_s,
        None if is_self else y_s,
        x_t.detach(),
        None if is_self else y_t.detach(),
        allowed.bounds,
        allowed.holes,
        row_weight,
        scale_t,
        scale_s,
        implementation,
        needs_gradient,
    )
    return loss


class _Relation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_s: Tensor,
        y_s: Tensor | None,
        x_t: Tensor,
        y_t: Tensor | None,
        bounds: Tensor | None,
        holes: Tensor | None,
        row_weight: Tensor | None,
        scale_t: float,
        scale_s: float,
        implementation: str,
        needs_gradient: bool,
    ) -> Tensor:
        forward, _ = _ops.named(implementation)
        prepare = needs_gradient and row_weight is not None
        rows, lse_t, lse_s, dx, dy = forward(
            x_t, y_t, x_s, y_s, bounds, holes, scale_t, scale_s, needs_gradient, prepare
        )
        ctx.save_for_backward(x_t, y_t, x_s, y_s, bounds, holes, row_weight, lse_t, lse_s, dx, dy)
        ctx.constants = (scale_t, scale_s, implementation)
        return rows if row_weight is None else (rows * row_weight).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_t, y_t, x_s, y_s, bounds, holes, row_weight, lse_t, lse_s, dx, dy = ctx.saved_tensors
        scale_t, scale_s, implementation = ctx.constants
        _, backward = _ops.named(implementation)
        weight = grad if row_weight is None else (grad * row_weight).expand(x_s.shape[:3])
        dx, dy = backward(
            x_t, y_t, x_s, y_s, bounds, holes, lse_t, lse_s, dx, dy, weight, scale_t, scale_s, row_weight is not None
        )
        if torch.is_grad_enabled():
            dx = _NoSecondDerivative.apply(dx, x_s, implementation)
            dy = _NoSecondDerivative.apply(dy, x_s, implementation)
        return dx, None if y_s is None else dy, *(None,) * 9


class _NoSecondDerivative(torch.autograd.Function):
    """The identity; differentiating it raises. (`once_differentiable` stays silent if grad_output needs no grad.)"""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, depends_on: Tensor, implementation: str) -> Tensor:
        ctx.implementation = implementation  # type: ignore[attr-defined]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"implementation={ctx.implementation!r} has first derivatives only; "
            "second derivatives need implementation='reference'"
        )
