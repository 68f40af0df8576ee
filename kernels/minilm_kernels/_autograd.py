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
from minilm_kernels._grouping import Group, relation_groups, weighted_total
from minilm_kernels._relations import Masks


def relation_losses(
    groups: Sequence[Group], teacher: Sequence[Tensor], student: Sequence[Tensor], masks: Masks, implementation: str
) -> tuple[Tensor, Tensor]:
    """Σ relation weight · loss, and the losses (relations,), detached, in the order of the groups.

    Without sums, of one group only, the rows (relations, B, R, N), twice.
    """
    if torch._C._are_functorch_transforms_active():
        raise _no_transforms(implementation)
    if forward_ad._current_level >= 0:  # the teacher is constant; of the student a tangent would be lost
        teacher = [x.detach() for x in teacher]
        if any([forward_ad.unpack_dual(x).tangent is not None for x in student]):
            raise RuntimeError(
                f"implementation={implementation!r} has no forward-mode derivatives; "
                "they need implementation='reference'"
            )
    if torch.is_grad_enabled() and any([x.requires_grad for x in student]):
        if torch.compiler.is_compiling():  # dynamo takes no tensor twice, as in QK beside KK
            teacher, student = [x.detach() for x in teacher], [x.view_as(x) for x in student]
        teacher = [x.detach() if x.requires_grad else x for x in teacher]
        return _RelationLosses.apply(groups, teacher, masks, implementation, *student)  # type: ignore[no-untyped-call,no-any-return]
    with torch.no_grad():  # the teacher may require gradients, and gets none
        relations = relation_groups(groups, teacher, student, masks)
        return weighted_total(groups, [_ops.FORWARD[implementation](*group, False)[0] for group in relations])


def _no_transforms(implementation: str) -> RuntimeError:
    return RuntimeError(
        f"implementation={implementation!r} works under no transform of torch.func (grad, vmap, jvp, jacfwd, ...) "
        "nor with batched gradients; they need implementation='reference'"
    )


class _RelationLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        groups: Sequence[Group],
        teacher: Sequence[Tensor],  # see `relation_groups`
        masks: Masks,
        implementation: str,
        *student: Tensor,
    ) -> tuple[Tensor, Tensor]:
        forward = _ops.FORWARD[implementation]
        results = [forward(*group, True) for group in relation_groups(groups, teacher, student, masks)]
        # A teacher under torch.inference_mode() cannot be saved, and needs not be: nobody changes it in place.
        unsaved = not torch.compiler.is_compiling() and any([x.is_inference() for x in teacher])
        ctx.teacher = teacher if unsaved else None
        kept = [] if ctx.teacher else teacher
        ctx.save_for_backward(*student, *kept, *[lse for result in results for lse in result[1:3]])
        ctx.options = groups, masks, implementation
        ctx.prepared = [result[3:] for result in results]
        total, values = weighted_total(groups, [result[0] for result in results])
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)  # else backward begins with zeros for them
        return total, values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad):
            raise _no_transforms(ctx.options[2])
        if not torch.is_grad_enabled():
            return None, None, None, None, *_gradients(ctx, grad)
        with torch.no_grad():  # create_graph=True
            gradients = _gradients(ctx, grad)
        return (
            None,
            None,
            None,
            None,
            *[
                _NoSecondDerivative.apply(g, x, grad, ctx.options[2])  # type: ignore[no-untyped-call]
                for g, x in zip(gradients, ctx.saved_tensors, strict=False)
            ],
        )


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    """Of the student's tensors. What the forward prepared is used up, in place, except in a compiled graph."""
    groups, masks, implementation = ctx.options
    saved, count = ctx.saved_tensors, len(ctx.needs_input_grad) - 4
    student, lse = saved[:count], saved[-2 * len(groups) :]
    teacher = ctx.teacher or saved[count : 2 * count]
    compiling, prepared = torch.compiler.is_compiling(), ctx.prepared
    if not compiling:
        ctx.prepared = [None] * len(groups)
    gradients: list[Tensor] = []
    for i, relations in enumerate(relation_groups(groups, teacher, student, masks)):
        of_group = lse[2 * i], lse[2 * i + 1], grad, groups[i].relation_weights
        if compiling:
            dx, dy = _ops.BACKWARD[implementation](*relations, *of_group, *prepared[i])
        else:  # none is left in a second backward
            dx, dy = prepared[i] or _ops.FORWARD[implementation](*relations, True)[3:]
            dx = dx or [torch.empty_like(x) for x in relations.x_s]
            dy = dy or [torch.empty_like(y) for y in relations.y_s]
            _ops.BACKWARD_IN_PLACE[implementation](*relations, *of_group, dx, dy)
        gradients += [*dx, *dy]
    return gradients


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
