"""Call after call: the same bits, and nothing left behind."""

import sys
from pathlib import Path

import pytest
import torch
from loss_cases import Case, build, evaluate

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import leaks

CASES = [
    Case(id="on chip", n=9, teacher=(1, 1, 8), student=(1, 1, 6), relations=("qk",), masks=("holes",)),
    Case(id="sweeps", n=33, teacher=(1, 1, 8), student=(1, 1, 6), relations=("qk",), reduction="token"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_hundred_runs_give_the_same_bits(case: Case, fused: str, device: str) -> None:
    inputs = build(case, device)
    first = evaluate(inputs, fused)
    for _ in range(99):
        again = evaluate(inputs, fused)
        assert torch.equal(again.loss, first.loss)
        assert all(
            [torch.equal(g, g_first) for g, g_first in zip(again.gradients[:2], first.gradients[:2], strict=True)]
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_calls_leave_nothing_behind() -> None:
    grown = leaks.growth(300)
    assert grown.objects < leaks.MOST.objects
    assert grown.process < leaks.MOST.process
