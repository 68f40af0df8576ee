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
    student = _student(relations)
    is_dual, compiling = forward_ad._current_level >= 0, torch.compiler.is_compiling()
    if is_dual and any([forward_ad.unpack_dual(x).tangent is not None for x in student]):
        raise RuntimeError(
            f"implementation={implementation!r} has no forward-mode derivatives; they need implementation='reference'"
        )
    has_gradient = torch.is_grad_enabled() and any([x.requires_grad for x in student])
    teacher = _teacher(relations)
    if is_dual or compiling or any([x.requires_grad for x in teacher]):  # the teacher is constant
        if compiling and has_gradient:  # dynamo takes no tensor twice, as in QK beside KK
            student = [x.view_as(x) for x in student]
        relations = _filled(_rest(relations), [x.detach() for x in teacher], student)
    if has_gradient:
        return _RelationLosses.apply(relations, implementation, *student)  # type: ignore[no-untyped-call,no-any-return]
    return weighted_total(relations, [_ops.forward(implementation, group, False)[0] for group in relations])


def _no_transforms(implementation: str) -> RuntimeError:
    return RuntimeError(
        f"implementation={implementation!r} works under no transform of torch.func (grad, vmap, jvp, jacfwd, ...) "
        "nor with batched gradients; they need implementation='reference'"
    )


class _RelationLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, relations: list[Relations], implementation: str, *student: Tensor) -> tuple[Tensor, Tensor]:
        results = [_ops.forward(implementation, group, True) for group in relations]
        # A teacher under torch.inference_mode() cannot be saved, and needs not be: nobody changes it in place.
        teacher = _teacher(relations)
        unsaved = not torch.compiler.is_compiling() and any([x.is_inference() for x in teacher])
        ctx.teacher = teacher if unsaved else None
        kept = [] if ctx.teacher else teacher
        ctx.save_for_backward(*student, *kept, *[lse for result in results for lse in result[1:3]])
        ctx.rest, ctx.implementation = _rest(relations), implementation
        ctx.prepared = [result[3:] for result in results]
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
            return None, None, *_gradients(ctx, grad)
        with torch.no_grad():  # create_graph=True
            gradients = _gradients(ctx, grad)
        return (
            None,
            None,
            *[
                _NoSecondDerivative.apply(g, x, grad, ctx.implementation)  # type: ignore[no-untyped-call]
                for g, x in zip(gradients, ctx.saved_tensors, strict=False)
            ],
        )


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    """The gradients of the student's tensors. In eager mode they use up, in place, what the forward prepared."""
    implementation, saved, count = ctx.implementation, ctx.saved_tensors, len(ctx.needs_input_grad) - 2
    student, lse = saved[:count], saved[-2 * len(ctx.rest) :]
    relations = _filled(ctx.rest, ctx.teacher or saved[count : 2 * count], student)
    compiling, prepared = torch.compiler.is_compiling(), ctx.prepared
    if not compiling:
        ctx.prepared = [None] * len(relations)
    gradients: list[Tensor] = []
    for i, group in enumerate(relations):
        of_group = lse[2 * i], lse[2 * i + 1], grad
        if compiling:
            dx, dy = _ops.BACKWARD[implementation](*group, *of_group, *prepared[i])
        else:  # none is left in a second backward
            dx, dy = prepared[i] or _ops.forward(implementation, group, True)[3:]
            dx = dx or [torch.empty_like(x) for x in group.x_s]
            dy = dy or [torch.empty_like(y) for y in group.y_s]
            _ops.backward_(implementation, group, *of_group, dx, dy)
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
        relations.append(Relations(*sides, *fields))
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
