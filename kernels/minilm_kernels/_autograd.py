"""Relations as an autograd Function over the registered ops; the student's tensors get gradients, nothing else does.

The weight of a row is either known beforehand and equal along each sequence (the scalar reductions: everything is
linear in it, and the ops may prepare gradients in the forward), or comes with the gradient of the rows.
"""

from typing import Any

import torch
from torch import Tensor

from minilm_kernels import _ops
from minilm_kernels._relations import Relations


def relation_op(relations: Relations, relation_weights: list[float], implementation: str) -> tuple[Tensor, Tensor]:
    """(Σ relation weight · loss, detached losses (relations,)); without sums the rows (relations, B, R, N), twice."""
    student = (*relations.x_s, *relations.y_s)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    constants = relations._replace(
        x_t=[x.detach() for x in relations.x_t], y_t=[y.detach() for y in relations.y_t], x_s=(), y_s=()
    )
    result: tuple[Tensor, Tensor] = _Relations.apply(  # type: ignore[no-untyped-call]
        constants, len(relations.x_s), relation_weights, implementation, needs_gradient, *student
    )
    return result


class _Relations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        constants: Relations,
        count: int,
        relation_weights: list[float],
        implementation: str,
        needs_gradient: bool,
        *student: Tensor,  # x_s of every relation, then y_s
    ) -> tuple[Tensor, Tensor]:
        relations = constants._replace(x_s=list(student[:count]), y_s=list(student[count:]))
        forward, _ = _ops.named(implementation)
        value, lse_t, lse_s, dx, dy = forward(*relations, needs_gradient)
        ctx.save_for_backward(*student, *constants.x_t, *constants.y_t, lse_t, lse_s)
        ctx.constants = constants._replace(x_t=(), y_t=())
        ctx.options = count, relation_weights, implementation
        ctx.prepared = dx, dy
        parts = value.detach()
        ctx.mark_non_differentiable(parts)
        if not relations.sums:
            return value, parts
        if any(weight != 1 for weight in relation_weights):
            value = torch.stack([part * weight for part, weight in zip(value, relation_weights, strict=True)])
        return value.sum(), parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        count, relation_weights, implementation = ctx.options
        *tensors, lse_t, lse_s = ctx.saved_tensors
        student, teacher = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        relations = ctx.constants._replace(
            x_t=teacher[:count], y_t=teacher[count:], x_s=student[:count], y_s=student[count:]
        )
        forward, backward = _ops.named(implementation)
        if ctx.prepared is None:  # a second backward: the first one completed the prepared gradients in place
            _, _, _, dx, dy = forward(*relations, True)
        else:
            dx, dy = ctx.prepared
            ctx.prepared = None
        dx = dx or [torch.empty_like(x) for x in relations.x_s]
        dy = dy or [torch.empty_like(y) for y in relations.y_s]
        backward(*relations, lse_t, lse_s, grad, relation_weights, dx, dy)
        gradients = [*dx, *dy]
        if torch.is_grad_enabled():
            gradients = [
                _NoSecondDerivative.apply(g, x, implementation)  # type: ignore[no-untyped-call]
                for g, x in zip(gradients, student, strict=True)
            ]
        return *(None,) * 5, *gradients


class _NoSecondDerivative(torch.autograd.Function):
    """The identity; differentiating it raises. (`once_differentiable` stays silent if grad_output needs no grad.)"""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, depends_on: Tensor, implementation: str) -> Tensor:
        ctx.implementation = implementation
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"implementation={ctx.implementation!r} has first derivatives only; "
            "second derivatives need implementation='reference'"
        )
