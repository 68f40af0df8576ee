"""What is wrong with flags, in one sentence each: values that no run takes, and flags that do not go together."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from minilm.values import find_fault

# Not given, or this one: which cannot be.
MODES = {"do_train": False, "do_eval": False, "do_predict": True}
# What --check goes with: how the demonstration is computed, not what.
BESIDE_CHECK = {
    *("check", "seed", "full_determinism", "implementation", "use_cpu", "bf16", "fp16", "tf32", "disable_tqdm"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
}
JSON_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # may also be the name of a file


def find_meaningless(given: Namespace, parser: HfArgumentParser, groups: Sequence[type]) -> str | None:
    """What no flag takes: nothing, a number out of its range, a mode that there is not, something that is no JSON."""
    for name, value in vars(given).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip() and value != parser.get_default(name):
                return f"--{name} is empty: give it a value, or leave it out"
    if fault := find_fault(vars(given), groups):
        return f"--{fault.name} is {fault.value}: it {fault.must}"
    for name, wrong in MODES.items():
        if getattr(given, name) is wrong:
            return f"--{name} {str(wrong).lower()} cannot be had: minilm-train trains and evaluates, and nothing else"
    for name in TrainingArguments._VALID_DICT_FIELDS:
        if isinstance(value := getattr(given, name), str) and (problem := _no_json(name, value)):
            return problem
    return None


def _no_json(name: str, value: str) -> str | None:
    """Of a flag that takes JSON, and some also a file of it: transformers would not name it."""
    if not value.startswith("{"):
        if name not in JSON_FILES:
            return f"--{name} is {value!r}: it must be JSON, as in '{{\"name\": 1}}'"
        if not os.path.isfile(value):  # a Path's raises where the name is too long
            return f"--{name} is {value!r}: there is no such file"
    try:
        json.loads(value if value.startswith("{") else Path(value).read_bytes(), parse_constant=_no_number)
    except (ValueError, OSError) as error:
        return f"--{name} is {value!r}, which cannot be read as JSON: {error}"
    return None


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def find_data_flag(given: Any) -> str | None:
    """What the demonstration, whose text is fixed, has no use for."""
    for flag in ("streaming", "data_weights", "data_config", "text_pair_column", "student"):
        if getattr(given, flag):
            return f"--{flag} is given without --data"
    return None


def find_beside_check(named: Sequence[str]) -> str | None:
    """Of the flags that are named beside --check the first that would make another run of it."""
    other = next((name for name in named if name not in BESIDE_CHECK), None)
    if other is None:
        return None
    return f"--{other} is given with --check, which is a run of the demonstration as it stands: leave one of them out"


def find_missing(given: Any) -> str | None:
    """What a run of one's own cannot do without."""
    if given.teacher is None:
        return "--data is given without --teacher"
    if given.data is None:
        return "--teacher is given without --data"
    if given.output_dir is None:
        return "--output_dir is missing: the folder for the student, its checkpoints and the report"
    sizes = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "init_layers")
    sized = [f"--{name} {value}" for size in sizes if (value := getattr(given, name := f"student_{size}")) is not None]
    if given.student is None and given.student_vocabulary is None and not sized:
        return "the student's size is missing: --student_num_layers, --student_hidden_size or both"
    sized += [f"--student_init {given.student_init}"] if given.student_init != "auto" else []
    if given.student is not None and sized:
        return f"--student {given.student} has sizes and weights of its own: leave out {sized[0]}"
    if given.streaming and not given.max_steps > 0:
        return f"--streaming needs --max_steps, which is {given.max_steps}: a stream has no end"
    if given.data_weights is not None and len(given.data_weights) != len(given.data):
        return f"--data_weights has {len(given.data_weights)} numbers for {len(given.data)} --data"
    return None
