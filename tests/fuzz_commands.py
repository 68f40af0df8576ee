"""Calls of the commands with wrong, extreme and hostile flags, data and model folders; each call is judged.

python tests/fuzz_commands.py --calls 10000 [--seed 0] [--only NUMBER]

Flags and the kinds of their values are drawn from the commands' own parsers, so that a new flag is tried without a
line here. The seed and its number make a call. Each runs in a process forked from this one. `judged_calls.py` says what
a fault is; faults are printed as they are found, and the exit code is 1 if there was one.
"""

import argparse
import contextlib
import gc
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from hostile_inputs import break_model, copied
from judged_calls import MAINS, TEACHERS, Case, Sandbox, fork_and_run, sandbox

# They compile, or ask for a demonstration that takes minutes; where to write is drawn apart.
NOT_TRIED = {"torch_compile", "torch_compile_backend", "torch_compile_mode", "check", "help", "output_dir", "output"}
INTEGERS = ["1", "2", "3", "4", "8"]
FLOATS = ["0", "0.1", "0.5", "1", "2.5"]
TEXTS = [
    *("", " ", "x", "text", "label", "0", "-1", "-x", "--", "--x", "=", "None", "true", "1e400", "nan", "-inf"),
    *("1e308", "-1e-300", "9" * 30, "9" * 5000, str(2**31), str(2**63), "0x10", "1_0", "１", "²", "1.5", "1,2", "1:2"),
    *("qk:", ":", "qk,qk", "qk:nan", "qq:1,kk:-1", "1:1", "0:1", "9:9", "1:1,1:2", ",", "{", "{}", '{"a": 1}', "[]"),
    *("null", "%s", "%(prog)s", "{0}", "a" * 100_000, "é", "\u202eabc", "\x1b[31mred", "a\nb", "a\rb", "\x7f"),
    *("\udcff", "\U0010ffff", "'", '"', "`|<b>", "$(touch x)", ";", "*", "?", "~", "..", ".", "/", "/dev/null"),
    *("/dev/full", "/dev/zero", "/proc/self/mem", "/proc/none", "http://localhost:1/x", "a/b/c", "user/name"),
    *("../../../x", "mteb:x", "list"),
]
OUTPUTS = [
    *("", " ", "a\nb", "\x1b[31m", "é" * 200, "\u202ex", "../x", "/dev/null", "/dev/null/x", "/proc/x", "model"),
    *("a/b/c", "-x", "a`b|<c>", "x" * 300, "x.part"),
]
TRAINED = [[], [], ["--streaming"], ["--packing"], ["--student_vocabulary", "40"], ["--objective", "minilm-v2"]]


def parser_of(main: Callable[[Sequence[str]], int]) -> argparse.ArgumentParser:
    """The parser that a command makes."""
    found: list[argparse.ArgumentParser] = []
    keep = patch.object(argparse.ArgumentParser, "print_help", lambda self, *_: found.append(self))
    with keep, contextlib.suppress(SystemExit):
        main(["--help"])
    return found[0]


def flags_of(main: Callable[[Sequence[str]], int]) -> list[argparse.Action]:
    return [action for action in parser_of(main)._actions if action.option_strings and action.dest not in NOT_TRIED]


FLAGS = {program: flags_of(main) for program, main in MAINS.items()}


def draw(number: int, seed: int, box: Sandbox) -> Case:
    """The call of that number; what it alone reads is written."""
    draws = random.Random(f"{seed} {number}")
    shutil.rmtree(box.here, ignore_errors=True)
    box.here.mkdir()
    program = draws.choices([*MAINS], [6, 2, 2])[0]
    kind = draws.choices(["flags", "tokens", "data", "model", "output"], [12, 1, 3, 4, 1])[0]
    fitting = "bert-lm" if program == "minilm-augment" else "bert"
    name = draws.choice([*TEACHERS]) if draws.random() < 0.3 else fitting
    model, about = str(box.inputs / name), kind
    if kind == "model":
        broken = copied(Path(model), box.here / "model")
        about, model = f"{name}: {break_model(broken, draws)}", str(broken)
    argv = _good(program, model, kind, draws, box)
    if kind == "flags" or draws.random() < 0.15:
        for _ in range(draws.choice([1, 1, 2, 3])):
            argv += _flag(draws.choice(FLAGS[program]), draws, box)
    if kind == "tokens":
        for _ in range(draws.choice([1, 2, 3])):
            place = draws.randrange(len(argv))
            argv[place : place + draws.choice([0, 1, 2])] = [draws.choice(TEXTS)] * draws.choice([0, 1, 1])
    if program == "minilm-train" and draws.random() < 0.95:
        argv.append("--dry_run")
    return Case(program, argv, about)


def _good(program: str, model: str, kind: str, draws: random.Random, box: Sandbox) -> list[str]:
    """A command line that works, but for what is broken in a call of this kind."""
    out = draws.choice(OUTPUTS) if kind == "output" else "out"
    good = box.inputs / ("good.txt" if program == "minilm-train" else "data/good.csv")
    data = str(draws.choice(box.data) if kind == "data" else good)
    if program == "minilm-augment":
        return [data, "--teacher", model, "--output", f"{out}.jsonl", "--samples", "2", "--candidates", "3"]
    if program == "minilm-eval":
        folder = box.inputs / "tasks"
        task = draws.choice(sorted(os.listdir(folder)) if kind == "data" else ["sst2", "sst2,stsb", "good-csv"])
        named = [] if draws.random() < 0.02 else ["--tasks", task]
        return [model, "--data_dir", str(folder), *named, "--output_dir", out, "--max_length", "16"]
    goes_on = kind == "model" and draws.random() < 0.2
    student = ["--student", model] if goes_on else ["--student_num_layers", "1"]
    teacher = str(box.inputs / "bert") if goes_on else model
    return [
        *("--teacher", teacher, "--data", data, "--output_dir", out, *student, *draws.choice(TRAINED)),
        *("--max_steps", "2", "--max_length", "16", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"),
        *("--report_to", "none", "--use_cpu"),
    ]


def _flag(action: argparse.Action, draws: random.Random, box: Sandbox) -> list[str]:
    """A flag with a value: one that its type takes, or any text, or a path."""
    name = draws.choice(action.option_strings)
    if action.nargs == 0:
        return [name]
    numbers = {int: INTEGERS, float: FLOATS}.get(action.type, TEXTS)  # type: ignore[call-overload]
    fitting = list(map(str, action.choices)) if action.choices else numbers
    paths = [str(box.inputs / name) for name in (*TEACHERS, "good.txt", "data", "tasks")]
    count = draws.choice([0, 1, 1, 1, 2]) if action.nargs in ("+", "*", "?") else 1
    values = [draws.choice(draws.choice([fitting, TEXTS, TEXTS, INTEGERS, paths])) for _ in range(count)]
    return [f"{name}={values[0]}"] if len(values) == 1 and draws.random() < 0.5 else [name, *values]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the call of this number alone, with what it said")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    _import_all()
    gc.freeze()
    only, first = arguments.only, arguments.first
    numbers = range(first, first + arguments.calls) if only is None else [only]
    ends: Counter[str] = Counter()
    wrong, begin = 0, time.monotonic()
    with sandbox() as box:
        for count, number in enumerate(numbers, 1):
            case = draw(number, arguments.seed, box)
            told, faults = fork_and_run(case, box)
            ends[f"{case.program} {told[:1] or 'killed'}"] += 1
            wrong += bool(faults)
            if faults or only is not None:
                shown = " ".join(value if len(value) < 300 else f"{value[:20]}..." for value in map(repr, case.argv))
                print(f"\n{number}: {case.about}\n  {case.program} {shown}\n  -> {told}", *faults, sep="\n  ")
            if count % 100 == 0 or count == len(numbers):
                seconds, by_end = time.monotonic() - begin, dict(sorted(ends.items()))
                print(f"{count} calls in {seconds:.0f} s, {wrong} wrong; ended with {by_end}", flush=True)
    return 1 if wrong else 0


def _import_all() -> None:
    """What the commands import when they run: here once, and in no child."""
    import sentence_transformers  # noqa: F401

    import minilm.cli.check
    import minilm.cli.evaluation_report
    import minilm.data.augment
    import minilm.evaluation.finetuning
    import minilm.evaluation.results
    import minilm.models.substitutes  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
