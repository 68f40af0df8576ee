"""The loss and its gradients in float64, and how far from them a provider is.

Rows of different sequences and heads have nothing to do with each other, so they are computed a few heads at a time by
the reference formula: no memory of the size of a batch of N×N matrices is needed.
"""

import math
from typing import NamedTuple

import torch
from _cases import Case, Inputs, Triple
from _providers import Loss
from torch import Tensor

from minilm import relation_kl

ELEMENTS = 1 << 24  # scores in one piece of work
# Of gradients, by norm: what rounding scores and probabilities in the type may cost. In the loss it averages out.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
LOSS_SHARE = 0.1
LOSS_SCALE = 2.0**16  # of float16, as in training: a gradient of a mean over all tokens is too small for it


class Outcome(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]  # of the student's q, k, v


def outcome(loss: Loss, inputs: Inputs) -> Outcome:
    value = loss(*inputs)
    if inputs.student[0].dtype != torch.float16:
        return Outcome(value.detach(), torch.autograd.grad(value, inputs.student))
    scaled = torch.autograd.grad(value, inputs.student, torch.full_like(value, LOSS_SCALE))
    return Outcome(value.detach(), tuple(g.float() / LOSS_SCALE for g in scaled))


def exact(case: Case, inputs: Inputs) -> Outcome:
    """Mean over sequences of the mean over heads and tokens (MiniLM eq. 6 and 9), each sequence cut to its length."""
    total = torch.zeros((), dtype=torch.float64, device=inputs.student[0].device)
    gradients = tuple(torch.zeros_like(x, dtype=torch.float64) for x in inputs.student)
    for b, n in enumerate(case.lengths):
        step = max(1, ELEMENTS // n**2)
        for h in range(0, case.heads, step):
            piece = (b, slice(h, h + step), slice(0, n))
            teacher = _piece(inputs.teacher, piece)
            student = tuple(x.requires_grad_() for x in _piece(inputs.student, piece))
            loss = torch.zeros_like(total)
            for x, y in case.sides:
                tensors = teacher[x], teacher[y], student[x], student[y]
                loss = loss + relation_kl(*tensors, causal=case.causal, reduction="sum", implementation="reference")
            loss = loss / (case.batch * case.heads * n)
            for gradient, of_piece in zip(gradients, torch.autograd.grad(loss, student), strict=True):
                gradient[piece] = of_piece.squeeze(0)
            total += loss.detach()
    return Outcome(total, gradients)


def _piece(tensors: Triple, piece: tuple[int, slice, slice]) -> Triple:
    q, k, v = (x.detach()[piece].unsqueeze(0).double() for x in tensors)
    return q, k, v


def rel_error(actual: Outcome, truth: Outcome, mode: str) -> float:
    """Of the loss ("forward"), of the gradient that is worst by norm ("backward"), or the larger ("both")."""
    errors = []
    if mode != "backward":
        errors.append(_distance(actual.loss, truth.loss))
    if mode != "forward":
        errors += [_distance(g, t) for g, t in zip(actual.gradients, truth.gradients, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _distance(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


def is_wrong(error: float, mode: str, dtype: str) -> bool:
    """Whether the error is more than rounding in `dtype` explains; true for NaN too."""
    return not error <= TOLERANCE[dtype] * (LOSS_SHARE if mode == "forward" else 1)
