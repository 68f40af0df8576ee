"""NaN and infinity: the first step and term are told, on whichever rank; none comes into JSON."""

import json

import pytest
import torch

from minilm.training.finite import NEVER, FiniteWatch, all_finite, without_nan

CPU = torch.device("cpu")


def alone(steps: torch.Tensor) -> torch.Tensor:
    return steps


def test_the_first_step_and_its_terms_are_told() -> None:
    watch = FiniteWatch(["qk", "vv", "loss"], CPU)
    watch.note(1, {"qk": torch.tensor(1.0), "vv": 2.0, "loss": torch.tensor(3.0)})
    assert watch.first(alone) is None
    watch.note(2, {"qk": 1.0, "vv": torch.tensor(float("inf")), "loss": float("inf")})
    watch.note(3, {"qk": float("nan"), "vv": 1.0, "loss": float("nan")})
    assert watch.first(alone) == (2, ["vv", "loss"])


def test_what_another_rank_saw_first_counts() -> None:
    watch = FiniteWatch(["qk", "vv"], CPU)
    watch.note(7, {"qk": float("nan")})
    assert watch.first(lambda steps: torch.cat([steps, torch.tensor([NEVER, 5])])) == (5, ["vv"])
    assert watch.first(lambda steps: torch.cat([steps, torch.tensor([NEVER, NEVER])])) == (7, ["qk"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_spoils_all_parameters(value: float) -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    assert all_finite(parameters) == 1
    with torch.no_grad():
        parameters[1][1, 0] = value
    assert all_finite(parameters).isnan()


def test_json_has_null_for_what_it_lacks() -> None:
    value = {"a": [1.0, float("nan")], "b": (float("inf"), "nan", None, 2), "c": {"d": -float("inf")}}
    text = json.dumps(without_nan(value), allow_nan=False)
    assert json.loads(text) == {"a": [1.0, None], "b": [None, "nan", None, 2], "c": {"d": None}}
