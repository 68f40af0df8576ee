"""The structures that self relations can have besides the default one, which tests and benchmarks ask for by name."""

import pytest
import torch
from loss_cases import Case, build, check_outcome, eager_and_exact, evaluate

from minilm_kernels._triton import _plan, _triangle, _tune
from minilm_kernels._triton._plan import Tiles
from minilm_kernels._triton._triangle import Walk

BF16, FP16 = torch.bfloat16, torch.float16
SELF = ("qq", "kk")
CASES = [
    Case(id="full", relations=SELF, n=48),
    Case(id="full bf16", relations=SELF, n=48, dtypes=(BF16, BF16), teacher=(2, 2, 20)),
    Case(id="right", relations=SELF, n=67, masks=("right",), dtypes=(BF16, BF16)),
    Case(id="left, holes", relations=SELF, n=50, batch=4, masks=("left", "holes", "full", "empty")),
    Case(id="packed", relations=SELF, n=60, packed=(0, 20, 20, 47, 55), dtypes=(FP16, FP16)),
    Case(id="near", relations=SELF, n=80, size=0.5, distance=0.01, dtypes=(BF16, BF16)),
    Case(id="near fp32", relations=SELF, n=64, size=0.3, distance=0.003),
    Case(id="spread", relations=SELF, n=60, spread=1.0, dtypes=(BF16, BF16)),
    Case(id="spread fp32", relations=SELF, n=60, spread=1.0),
    Case(id="one token", relations=SELF, n=1),
    Case(id="token", relations=SELF, n=40, batch=2, masks=("right", "one"), reduction="token"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("blocks", [(32, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("structure", ["symmetric", "triangle"])
def test_agrees_with_float64(
    structure: str, blocks: tuple[int, int], case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "resident_tokens", lambda *_: 0)
    monkeypatch.setattr(_tune, "tiles", lambda *_: Tiles(*blocks, 4, 2))
    monkeypatch.setattr(_triangle, "FORWARD", Walk(*blocks, 1, 2, 2))
    monkeypatch.setattr(_triangle, "BACKWARD", Walk(*blocks, 4, 2, 3))
    with _plan.self_structure(structure):
        outcome = evaluate(build(case, device), "triton")
    check_outcome(outcome, *eager_and_exact(case, device))
