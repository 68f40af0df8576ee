"""Short sequences, whose rows stay on chip: every pattern of keys, and programs that walk over several heads."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from loss_cases import Case, build, evaluate

import minilm_kernels._triton as kernels
from minilm_kernels._triton._launch import LOG2_E
from minilm_kernels._triton._plan import Problem
from minilm_kernels._triton._steps import FLOOR

pytestmark = pytest.mark.usefixtures("nan_filled")

CASES = [
    Case(id="plain", n=19, batch=3, student=(2, 2, 6)),
    Case(id="a power of two", n=32, student=(2, 2, 6)),
    Case(id="masked", n=19, batch=4, student=(2, 2, 6), masks=("holes", "empty", "left", "right")),
    Case(id="causal", n=19, batch=2, student=(2, 2, 6), causal=True, masks=("full", "right")),
    Case(id="prefix", n=19, batch=2, student=(2, 2, 6), causal=True, prefix=(9, 0)),
    Case(id="packed", n=29, student=(2, 2, 6), packed=(0, 10, 10, 23)),
    Case(id="three relations", n=19, batch=2, student=(2, 2, 6), relations=("qq", "kk", "vv"), reduction="token"),
]


def test_the_score_of_a_key_that_is_not_allowed_is_exact_times_any_scale() -> None:
    """Else `FLOOR · scale − max`, which GPUs compute with one rounding, is not 0 where it is in the interpreter."""
    floor = np.float32(FLOOR.value)
    for dim in range(1, 1025):
        for temperature in (0.1, 0.7, 1.0, 2.0, 30.0):
            scale = np.float32(LOG2_E / (math.sqrt(dim) * temperature))
            assert float(floor * scale) == float(floor) * float(scale)


@pytest.fixture
def structures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of the forwards, as they are made."""
    made: list[str] = []
    count: Callable[[Problem], int] = kernels.persistent_programs

    def noted(problem: Problem) -> int:
        made.append(problem.structure)
        return count(problem)

    monkeypatch.setattr(kernels, "persistent_programs", noted)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gives_the_formula(case: Case, device: str, structures: list[str]) -> None:
    inputs = build(case, device)
    actual, expected = evaluate(inputs, "triton"), evaluate(inputs, "reference")
    assert structures == ["resident"] * (1 if len(case.relations) == 3 else 2)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-7)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(g, g_expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_walk_over_the_heads_gives_the_same(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for three heads; the last may have fewer."""
    inputs = build(case, device)
    expected = evaluate(inputs, "triton")
    monkeypatch.setattr(kernels, "persistent_programs", lambda problem: -(-math.prod(problem.shape[:3]) // 3))
    actual = evaluate(inputs, "triton")
    # The walk is another program: a GPU's compiler may fuse other products into sums there.
    rtol = 1e-6 if device == "cuda" else 0.0
    torch.testing.assert_close(actual.loss, expected.loss, rtol=rtol, atol=0)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(g, g_expected, rtol=rtol, atol=rtol * g_expected.abs().max().item())
