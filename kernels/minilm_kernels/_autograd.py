"""Relations as an autograd Function over the registered ops; the student's tensors get gradients, nothing else does.

The weight of a row is either known beforehand and equal along each sequence (the scalar reductions: everything is
linear in it, and the ops may prepare gradients in the forward), or comes with the gradient of the rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minilm_kernels import _ops
from minilm_kernels._relations import Relations, weighted_total


def relation_losses(
    groups: Sequence[Relations], weights: Sequence[list[float]], implementation: str
) -> tuple[Tensor, list[Tensor]]:
    """Σ relation weight · loss, and of each group the losses (relations,), detached.

    Without sums, of one group only, the rows (relations, B, R, N), twice.
    """
    student = [x for group in groups for x in (*group.x_s, *group.y_s)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in student):
        teacher = [x.detach() for group in groups for x in (*group.x_t, *group.y_t)]
        sizes = [(len(group.x_s), len(group.y_s)) for group in groups]
        masks = groups[0].bounds, groups[0].holes, groups[0].row_weight
        constants = [(g.weight, g.scale_t, g.scale_s, g.symmetric, g.sums) for g in groups]
        if torch.compiler.is_compiling():
            student = [x.view_as(x) for x in student]  # dynamo takes no tensor twice, as in QK beside KK
        total, *values = _RelationLosses.apply(  # type: ignore[no-untyped-call]
            teacher, masks, sizes, constants, weights, implementation, *student
        )
        return total, values
    with torch.no_grad():  # the teacher may require gradients, and gets none
        values = [_ops.FORWARD[implementation](*group, False)[0] for group in groups]
    return (weighted_total(values, weights) if groups[0].sums else values[0]), values


def _groups(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    masks: tuple[Any, ...],
    sizes: list[tuple[int, int]],
    constants: list[tuple[Any, ...]],
) -> list[Relations]:
    """The groups again, out of their tensors: of each group x of every relation, then y."""
    groups, start = [], 0
    for (rows, keys), fields in zip(sizes, constants, strict=True):
        middle, end = start + rows, start + rows + keys
        tensors = teacher[start:middle], teacher[middle:end], student[start:middle], student[middle:end]
        groups.append(Relations(*tensors, *masks, *fields))
        start = end
    return groups


class _RelationLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher: list[Tensor],  # of each group x_t of every relation, then y_t
        masks: tuple[Any, ...],  # bounds, holes and row_weight, which all groups have in common
        sizes: list[tuple[int, int]],  # numbers of x and of y of each group
        constants: list[tuple[Any, ...]],  # of each group: weight, scale_t, scale_s, symmetric, sums
        weights: Sequence[list[float]],
        implementation: str,
        *student: Tensor,  # as the teacher's
    ) -> tuple[Tensor, ...]:
        groups = _groups(teacher, student, masks, sizes, constants)
        results = [_ops.FORWARD[implementation](*group, True) for group in groups]
        ctx.save_for_backward(*student, *teacher, *(lse for result in results for lse in result[1:3]))
        ctx.options = masks, sizes, constants, weights, implementation
        ctx.prepared = [result[3:] for result in results]
        values = [result[0] for result in results]
        if groups[0].sums:
            total = weighted_total(values, weights)
        else:
            [total] = values
            values = [total.detach()]
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)  # else backward begins with zeros for each of them
        return total, *values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        masks, sizes, constants, weights, implementation = ctx.options
        saved, count = ctx.saved_tensors, sum(rows + keys for rows, keys in sizes)
        student, lse = saved[:count], saved[2 * count :]
        groups = _groups(saved[count : 2 * count], student, masks, sizes, constants)
        prepared = ctx.prepared
        if not torch.compiler.is_compiling():
            ctx.prepared = [None] * len(groups)
        gradients: list[Tensor] = []
        with torch.no_grad():  # create_graph=True turns gradients on in here
            for i, group in enumerate(groups):
                of_group = (lse[2 * i], lse[2 * i + 1], grad, weights[i])
                gradients += _gradients(group, of_group, prepared[i], implementation)
        if torch.is_grad_enabled():
            gradients = [
                _NoSecondDerivative.apply(g, x, implementation)  # type: ignore[no-untyped-call]
                for g, x in zip(gradients, student, strict=True)
            ]
        return *(None,) * 6, *gradients


def _gradients(
    group: Relations,
    saved: tuple[Any, ...],
    prepared: tuple[list[Tensor], list[Tensor]] | None,
    implementation: str,
) -> list[Tensor]:
    """dx of every relation, then dy. What the forward prepared is used up, in place, except in a compiled graph."""
    if torch.compiler.is_compiling():
        assert prepared is not None
        dx, dy = _ops.BACKWARD[implementation](*group, *saved, *prepared)
        return [*dx, *dy]
    dx, dy = prepared or _ops.FORWARD[implementation](*group, True)[3:]  # none is left in a second backward
    dx = dx or [torch.empty_like(x) for x in group.x_s]
    dy = dy or [torch.empty_like(y) for y in group.y_s]
    _ops.BACKWARD_IN_PLACE[implementation](*group, *saved, dx, dy)
    return [*dx, *dy]


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
