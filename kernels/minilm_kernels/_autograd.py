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
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in student)):
        with torch.no_grad():  # the teacher may require gradients, and gets none
            value = _ops.forward(implementation)(*relations, False)[0]
        return _total(value, relations.sums, relation_weights), value
    result: tuple[Tensor, Tensor] = _Relations.apply(  # type: ignore[no-untyped-call]
        [x.detach() for x in relations.x_t],
        [y.detach() for y in relations.y_t],
        (
            relations.bounds,
            relations.holes,
            relations.row_weight,
            relations.weight,
            relations.scale_t,
            relations.scale_s,
            relations.symmetric,
            relations.sums,
        ),
        relation_weights,
        implementation,
        *student,
    )
    return result


def _total(value: Tensor, sums: bool, relation_weights: list[float]) -> Tensor:
    if not sums:
        return value
    if any(weight != 1 for weight in relation_weights):
        value = torch.stack([part * weight for part, weight in zip(value, relation_weights, strict=True)])
    return value.sum()


class _Relations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_t: list[Tensor],
        y_t: list[Tensor],
        constants: tuple[Any, ...],  # the fields of Relations after the tensors
        relation_weights: list[float],
        implementation: str,
        *student: Tensor,  # x_s of every relation, then y_s
    ) -> tuple[Tensor, Tensor]:
        count = len(x_t)
        relations = Relations(x_t, y_t, student[:count], student[count:], *constants)
        value, lse_t, lse_s, dx, dy = _ops.forward(implementation)(*relations, True)
        ctx.save_for_backward(*student, *x_t, *y_t, lse_t, lse_s)
        ctx.options = count, constants, relation_weights, implementation
        ctx.prepared = dx, dy
        parts = value.detach()
        ctx.mark_non_differentiable(parts)
        return _total(value, relations.sums, relation_weights), parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        count, constants, relation_weights, implementation = ctx.options
        *tensors, lse_t, lse_s = ctx.saved_tensors
        student, teacher = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        relations = Relations(teacher[:count], teacher[count:], student[:count], student[count:], *constants)
        with torch.no_grad():  # create_graph=True turns gradients on in here
            dx, dy = _gradients(ctx, relations, (lse_t, lse_s, grad, relation_weights), implementation)
        gradients = [*dx, *dy]
        if torch.is_grad_enabled():
            gradients = [
                _NoSecondDerivative.apply(g, x, implementation)  # type: ignore[no-untyped-call]
                for g, x in zip(gradients, student, strict=True)
            ]
        return *(None,) * 5, *gradients


def _gradients(
    ctx: Any, relations: Relations, saved: tuple[Any, ...], implementation: str
) -> tuple[list[Tensor], list[Tensor]]:
    if torch.compiler.is_compiling():
        made: tuple[list[Tensor], list[Tensor]] = _ops.backward(implementation)(*relations, *saved, *ctx.prepared)
        return made
    # In place, which a compiled graph must not do to what autograd keeps for a second backward.
    if ctx.prepared is None:  # this is one: the first used them up
        ctx.prepared = _ops.forward(implementation)(*relations, True)[3:]
    dx, dy = ctx.prepared
    ctx.prepared = None
    dx = dx or [torch.empty_like(x) for x in relations.x_s]
    dy = dy or [torch.empty_like(y) for y in relations.y_s]
    _ops.backward_(implementation)(*relations, *saved, dx, dy)
    return dx, dy


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
