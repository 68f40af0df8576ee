"""One rule for all numbers that flags take, those of `TrainingArguments` among them."""

from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from transformers import TrainingArguments

from minilm.cli.flags import DataArguments, ModelArguments, ObjectiveArguments
from minilm.values import find_fault

KINDS = [ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments]


def names_of(number: type) -> list[str]:
    """The flags that take such a number, or a list of them."""
    hints = [(name, hint) for kind in KINDS for name, hint in get_type_hints(kind).items()]
    return [name for name, hint in hints if hint in (number, number | None, list[number] | None)]  # type: ignore


def must(**values: Any) -> str | None:
    fault = find_fault(values, KINDS)
    return fault and fault.must


def test_every_default_passes() -> None:
    assert find_fault({field.name: field.default for kind in KINDS for field in fields(kind)}, KINDS) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), float("1e400")])
def test_every_float_is_finite(value: float) -> None:
    floats = names_of(float)
    assert {"learning_rate", "num_train_epochs", "eval_steps", "output_weight", "data_weights"} <= set(floats)
    for name in floats:
        given = [value] if name == "data_weights" else value
        assert (must(**{name: given}) or "").startswith("must be finite"), name


def test_no_number_is_negative_unless_its_default_is() -> None:
    numbers = {*names_of(int), *names_of(float)}
    allowed = {name for name in numbers if must(**{name: [-1] if name == "data_weights" else -1}) is None}
    assert allowed <= {"max_steps", "teacher_layer", "local_rank"}
    assert {"max_steps", "teacher_layer"} <= allowed


@pytest.mark.parametrize(
    ("name", "wrong", "right", "words"),
    [
        ("gradient_accumulation_steps", 0, 1, "must be at least 1"),
        ("student_num_layers", 0, 1000, "must be at least 1"),
        ("student_num_layers", 1001, 1000, "must be at most 1000"),
        ("data_seed", -1, 2**32, "must not be negative"),
        ("data_seed", 2**70, 2**63 - 1, f"must be at most {2**63 - 1}"),
        ("teacher_layer", 10**400, -1, f"must be at most {2**63 - 1}"),  # no float is as large
        ("seed", 2**32, 2**32 - 1, f"must be at most {2**32 - 1}"),
        ("adam_beta1", 1.0, 0.0, "must be below 1"),
        ("max_steps", 0, -1, "must be at least 1, or -1 to go by num_train_epochs"),
        ("max_steps", -2, 1, "must be at least 1, or -1 to go by num_train_epochs"),
        ("eval_steps", 0.0, 0.5, "must be finite and positive"),
        ("learning_rate", -1.0, 0.0, "must be finite and not negative"),
        ("output_weight", 1e300, 1e30, "must be at most 3.402823e+38"),
        ("relation_temperature", 1e-300, 1e-6, "must lie between 1e-06 and 1e+06"),
        ("output_temperature", 1e30, 1e6, "must lie between 1e-06 and 1e+06"),
        ("save_total_limit", -1, 0, "must not be negative"),
    ],
)
def test_ranges(name: str, wrong: float, right: float, words: str) -> None:
    assert must(**{name: wrong}) == words
    assert must(**{name: right}) is None
