"""The fused losses against float64 on any call, by hypothesis; `--hypothesis-profile=long` tries many more."""

from dataclasses import replace

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import assume
from loss_cases import Case, Outcome, build, evaluate
from property_cases import STRUCTURES, cases, check_rule, holds, largest_score

pytestmark = [
    pytest.mark.parametrize("structure", STRUCTURES),
    pytest.mark.skipif(torch.cuda.is_available(), reason="small tiles, which are compiled for each shape there"),
]


def is_finite(outcome: Outcome) -> bool:
    return all(x.isfinite().all() for x in (outcome.loss, *outcome.gradients) if x is not None)


def check(implementation: str, case: Case) -> None:
    inputs = build(case, "cpu")
    eager = evaluate(inputs, "reference")
    # float16 ends at 65504 for eager code; float32 holds scores beyond 1e8 to within 8 at best
    assume(is_finite(eager) and largest_score(case, inputs) < 1e8)
    exact = evaluate(inputs, "reference", torch.float64)
    check_rule(case, inputs, implementation, evaluate(inputs, implementation), eager, exact)


def test_at_most_twice_the_error_of_eager_code(structure: str) -> None:
    holds(structure, check, case=cases())


def test_so_is_the_gradient_of_a_student_that_almost_agrees(structure: str) -> None:
    """Distances down to 1e-6: losses of 1e-12."""
    holds(structure, check, case=cases(types=(torch.float32,), near=True))


def check_equal(implementation: str, case: Case) -> None:
    inputs = build(replace(case, distance=0.0), "cpu")
    outcome = evaluate(inputs, implementation)
    assert outcome.loss == 0
    zeros = Outcome(torch.zeros(()), tuple(g if g is None else torch.zeros_like(g) for g in outcome.gradients))
    check_rule(case, inputs, implementation, outcome, eager=zeros, exact=zeros)


def test_a_student_equal_to_the_teacher_has_no_loss(structure: str) -> None:
    """Both models' scores take the same roundings, so that the loss is 0 itself; the gradient is, to rounding."""
    holds(structure, check_equal, case=cases(near=True))
