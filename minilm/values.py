"""Which numbers the flags take: one rule for all, and what goes beyond it by name.

Every number is finite, in float32 too, and not negative unless its default is: a new flag needs no line here. Python
reads "nan", "inf" and "1e400" as numbers, and most of them fail late or, worse, train.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any, NamedTuple

FLOAT32_MAX = 3.4028234663852886e38
POSITIVE = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("eval_accumulation_steps", "dataloader_prefetch_factor", "logging_steps", "eval_steps", "save_steps"),
    *("student_num_layers", "student_hidden_size", "student_num_heads", "student_intermediate_size"),
    *("assistant_num_layers", "assistant_hidden_size", "relation_heads", "max_length", "shuffle_buffer"),
    *("data_weights", "ddp_timeout", "ddp_bucket_cap_mb", "intermediate_steps"),
}
BELOW_ONE = {"adam_beta1", "adam_beta2"}
TEMPERATURES = {"relation_temperature", "output_temperature"}
COLDEST, HOTTEST = 1e-6, 1e6  # scores divided by it, and its square, stay far inside float32
LARGEST = {
    "seed": 2**32 - 1,  # numpy's
    "student_num_layers": 1000,  # what is more takes minutes to build, or all memory
    "assistant_num_layers": 1000,
    "per_device_train_batch_size": 2**20,  # what is more would run out of memory at the first evaluation, or later
    "per_device_eval_batch_size": 2**20,
    "dataloader_num_workers": 1024,  # processes, each with its own tokenizer
}
LARGEST_INTEGER = 2**63 - 1  # torch's


class Fault(NamedTuple):
    """A value that its name does not take, and what it must be."""

    name: str
    value: Any
    must: str


def find_fault(values: Mapping[str, Any], groups: Iterable[type]) -> Fault | None:
    """The first number among `values` that breaks the rule; None if there is none.

    Args:
        values: by name; of a list each number counts, and what is no number is passed over.
        groups: the dataclasses whose fields they are, which know the defaults.
    """
    for group in groups:
        for field in fields(group):
            value = values.get(field.name)
            for number in value if isinstance(value, list) else [value]:
                if must := _broken(field, number):
                    return Fault(field.name, number, must)
    return None


def _broken(field: Field[Any], number: Any) -> str | None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    name, negative = field.name, isinstance(field.default, int | float) and field.default < 0
    sign = "positive" if name in POSITIVE | TEMPERATURES else "" if negative else "not negative"
    below = {"positive": number <= 0, "not negative": number < 0, "": False}[sign]
    if isinstance(number, float) and not math.isfinite(number):
        return f"must be finite{sign and f' and {sign}'}"
    if below:
        if isinstance(number, float):
            return f"must be finite and {sign}"
        return "must be at least 1" if sign == "positive" else "must not be negative"
    if name == "max_steps" and number < 1 and number != field.default:
        return f"must be at least 1, or {field.default} to go by num_train_epochs"
    if name in BELOW_ONE and number >= 1:
        return "must be below 1"
    if name in TEMPERATURES and not COLDEST <= number <= HOTTEST:
        return f"must lie between {COLDEST:g} and {HOTTEST:g}"
    largest = LARGEST.get(name, FLOAT32_MAX if isinstance(number, float) else LARGEST_INTEGER)
    if number > largest:
        return f"must be at most {largest:.7g}" if isinstance(number, float) else f"must be at most {largest}"
    return None
