"""Relations as an autograd Function over the registered ops; the student's tensors get gradients, nothing else does.

The weight of a row is either known beforehand and equal along each sequence (the scalar reductions: everything is
linear in it, and the ops may prepare gradients in the forward), or comes with the gradient of the rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minilm_kernels import _ops
from minilm_kernels._relations import Relations, weighted_total


def relation_losses(relations: list[Relations], implementation: str) -> tuple[Tensor, Tensor]:
    """What `weighted_total` gives; the losses are detached."""
    if torch._C._are_functorch_transforms_active():
        raise _no_transforms(implementation)
    student, teacher = _student(relations), _teacher(relations)
    watched = _ops.is_watched(student + teacher)
    is_dual = forward_ad._current_level >= 0
    if is_dual and any([forward_ad.unpack_dual(x).tangent is not None for x in student]):
        raise RuntimeError(
            f"implementation={implementation!r} has no forward-mode derivatives; they need implementation='reference'"
        )
    has_gradient = torch.is_grad_enabled() and any([x.requires_grad for x in student])
    if is_dual or watched or any([x.requires_grad for x in teacher]):  # the teacher is constant
        teacher = [x.detach() for x in teacher]
        if has_gradient and torch.compiler.is_compiling():  # dynamo takes no tensor twice, as in QK beside KK
            student = [x.view_as(x) for x in student]
        relations = _filled(_rest(relations), teacher, student)
    if has_gradient:
        return _RelationLosses.apply(relations, teacher, implementation, watched, *student)  # type: ignore[no-untyped-call,no-any-return]
    return weighted_total(relations, [_ops.forward(implementation, watched, group, False)[0] for group in relations])


def _no_transforms(implementation: str) -> RuntimeError:
    return RuntimeError(
        f"implementation={implementation!r} works under no transform of torch.func (grad, vmap, jvp, jacfwd, ...) "
        "nor with batched gradients; they need implementation='reference'"
    )


class _RelationLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        relations: list[Relations],
        teacher: list[Tensor],  # of the relations
        implementation: str,
        watched: bool,  # see `_ops`
        *student: Tensor,
    ) -> tuple[Tensor, Tensor]:
        results = [_ops.forward(implementation, watched, group, True) for group in relations]
        # A teacher under torch.inference_mode() cannot be saved, and needs not be: nobody changes it in place.
        unsaved = not torch.compiler.is_compiling() and any([x.is_inference() for x in teacher])
        ctx.teacher = teacher if unsaved else None
        ctx.save_for_backward(*student, *([] if unsaved else teacher))
        ctx.rest, ctx.implementation = _rest(relations), implementation
        ctx.prepared = [result[1:] for result in results]
        total, values = weighted_total(relations, [result[0] for result in results])
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)  # else backward begins with zeros for them
        return total, values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad):
            raise _no_transforms(ctx.implementation)
        if not torch.is_grad_enabled():
            return *_NO_GRADIENTS, *_gradients(ctx, grad)
        with torch.no_grad():  # create_graph=True
            gradients = _gradients(ctx, grad)
        return (
            *_NO_GRADIENTS,
            *[
                _NoSecondDerivative.apply(g, x, grad, ctx.implementation)  # type: ignore[no-untyped-call]
                for g, x in zip(gradients, ctx.saved_tensors, strict=False)
            ],
        )


_NO_GRADIENTS = (None,) * 4  # of what `_RelationLosses` gets before the student's tensors


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    """The gradients of the student's tensors. In eager mode they use up, in place, what the forward prepared."""
    implementation, saved = ctx.implementation, ctx.saved_tensors
    count = len(ctx.needs_input_grad) - len(_NO_GRADIENTS)
    student, teacher = saved[:count], ctx.teacher or saved[count:]
    relations, prepared = _filled(ctx.rest, teacher, student), ctx.prepared
    compiling, watched = torch.compiler.is_compiling(), _ops.is_watched((grad, *student))
    if not compiling:
        ctx.prepared = [None] * len(relations)
    gradients: list[Tensor] = []
    for group, of_group in zip(relations, prepared, strict=True):
        if compiling:
            lse_t, lse_s, dx, dy = of_group
            dx, dy = _ops.BACKWARD[implementation](*group, lse_t, lse_s, grad, dx, dy)
        else:  # none is left in a second backward
            lse_t, lse_s, dx, dy = of_group or _ops.forward(implementation, watched, group, True)[1:]
            dx = dx or [torch.empty_like(x) for x in group.x_s]
            dy = dy or [torch.empty_like(y) for y in group.y_s]
            _ops.backward_(implementation, watched, group, lse_t, lse_s, grad, dx, dy)
        gradients += [*dx, *dy]
    return gradients


def _student(relations: list[Relations]) -> list[Tensor]:
    """The student's tensors, one call of an op after the other: x of each relation of that call, then y."""
    return [x for group in relations for x in (*group.x_s, *group.y_s)]


def _teacher(relations: list[Relations]) -> list[Tensor]:
    return [x for group in relations for x in (*group.x_t, *group.y_t)]


Rest = tuple[int, int, tuple[Any, ...]]  # how many x and y, and the fields behind the tensors


def _rest(relations: list[Relations]) -> list[Rest]:
    """The relations without their tensors: those are autograd's to keep."""
    return [(len(group.x_s), len(group.y_s), group[4:]) for group in relations]


def _filled(rest: Sequence[Rest], teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Relations]:
    """The relations with these tensors, in the order of `_teacher` and `_student`."""
    relations, start = [], 0
    for x_count, y_count, fields in rest:
        middle, end = start + x_count, start + x_count + y_count
        sides = teacher[start:middle], teacher[middle:end], student[start:middle], student[middle:end]
        relations.append(Relations._make((*sides, *fields)))
        start = end
    return relations


class _NoSecondDerivative(torch.autograd.Function):
    """The identity; differentiating it raises. (`once_differentiable` stays silent if grad_output needs no grad.)"""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, student: Tensor, grad: Tensor, implementation: str) -> Tensor:
        ctx.implementation = implementation
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"implementation={ctx.implementation!r} has first derivatives only; "
            "second derivatives need implementation='reference'"
        )
