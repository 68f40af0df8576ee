"""`minilm-train --check`: do the demonstration's first steps go as those of the reference run did?

The reference run, `reference_run.json` beside this file, is the demonstration under several seeds, each loss by step;
`bench/reference_run.py` makes it. A check trains under the same schedule and stops early.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minilm.cli.arguments import Arguments
from minilm.cli.distill import prepare
from minilm.cli.rehearsal import unsaved
from minilm.cli.report import History, overview
from minilm.errors import UsageError

REFERENCE = Path(__file__).with_name("reference_run.json")
STEPS = 100
WINDOW = 50  # steps from one evaluation to the next, and between the batches of a length that the sampler draws
PREFIXES = {"held-out": "eval_", "training": ""}  # in the Trainer's log
# With the docstrings of 3.12, 3.13 and Debian's 3.11 held-out losses moved by up to 0.033, in bf16 by up to 0.002.
TOLERANCE = 0.04


class Band(NamedTuple):
    """From where to where."""

    low: float
    high: float


class Reading(NamedTuple):
    """A loss up to a step, and between what it should lie."""

    part: str
    split: str
    step: int
    measured: float
    band: Band

    @property
    def inside(self) -> bool:
        return self.band.low <= self.measured <= self.band.high


def window_means(by_step: Mapping[int, float]) -> dict[int, float]:
    """By the last step of a window the mean of its values; of an evaluation at step 0 its own."""
    windows: dict[int, list[float]] = {}
    for step, value in by_step.items():
        windows.setdefault(math.ceil(step / WINDOW) * WINDOW, []).append(value)
    return {step: statistics.mean(values) for step, values in windows.items()}


def bands(curves: Sequence[Mapping[int, float]], t_quantile: float) -> dict[int, Band]:
    """By step, where one more run's value should lie, given those of some seeds.

    That is the prediction interval of a normal distribution whose spread is itself estimated, mean ± t·s·√(1 + 1/n),
    and TOLERANCE of the mean more on both sides, for what seeds do not vary. The spread relative to the mean is taken
    to be the same at all steps but 0, and is estimated from them together: of five seeds at one step it would be so
    uncertain that the band were more than twice as wide.

    Args:
        curves: of each seed, the values by step.
        t_quantile: Student's, for n - 1 degrees of freedom of each step but 0.
    """
    values = {step: [curve[step] for curve in curves] for step in curves[0]}
    means = {step: statistics.mean(of_step) for step, of_step in values.items()}
    squares = [(statistics.stdev(values[step]) / means[step]) ** 2 for step in values if step]
    half = t_quantile * math.sqrt(statistics.mean(squares) * (1 + 1 / len(curves))) + TOLERANCE
    return {step: Band(mean * (1 - half), mean * (1 + half)) for step, mean in means.items()}


def compare(history: History, reference: dict[str, Any]) -> list[Reading]:
    """Each part of the loss, held-out and in training, up to STEPS.

    Args:
        history: the Trainer's log of a run.
        reference: the content of `reference_run.json`.
    """
    readings = []
    for curve in reference["curves"]:
        part, split = curve["part"], curve["split"]
        name = PREFIXES[split] + part
        measured = window_means({row["step"]: row[name] for row in history if name in row})
        of_seeds = [window_means(dict(zip(curve["steps"], values, strict=True))) for values in curve["losses"]]
        for step, band in bands(of_seeds, reference["t_quantile"]).items():
            if step <= STEPS:
                readings.append(Reading(part, split, step, measured[step], band))
    return readings


def check(arguments: Arguments) -> tuple[str, bool]:
    """Takes the steps in a folder that is removed; returns what came out, and whether all of it is as it should be.

    Raises `ValueError` and others as `minilm.cli.distill.prepare`.
    """
    if (processes := arguments.training.world_size) > 1:
        raise UsageError(f"--check is a run of one process, and {processes} were started: their batches are larger")
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(replace(arguments, training=unsaved(arguments.training, folder)))
        with run.claims:
            run.metrics["student"]["name"] = "none, the student is not kept"
            run.trainer.add_callback(_EarlyStop())
            run.trainer.train()
    if run.trainer.stopped_by is not None:
        raise KeyboardInterrupt
    readings = compare(run.trainer.state.log_history, reference)
    return f"{overview(run.metrics)}\n{tell(readings, reference)}", all(reading.inside for reading in readings)


class _EarlyStop(TrainerCallback):
    """The steps are the first of all that the schedule is made for."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= STEPS


def tell(readings: Sequence[Reading], reference: dict[str, Any]) -> str:
    """A line each, and one on all."""
    lines = ["loss          steps   measured  band"]
    for reading in readings:
        loss = f"{reading.part} {reading.split}"
        steps = f"{reading.step - WINDOW + 1}-{reading.step}" if reading.split == "training" else str(reading.step)
        band = f"{reading.band.low:.4f} to {reading.band.high:.4f}"
        verdict = "inside" if reading.inside else "OUTSIDE"
        lines.append(f"{loss:<12}  {steps:>6}  {reading.measured:>8.4f}  {band}  {verdict}")
    outside = sum(not reading.inside for reading in readings)
    found = f"{outside} of {len(readings)} losses lie outside" if outside else f"All {len(readings)} losses lie in"
    seeds, torch, python = len(reference["seeds"]), reference["torch"], reference["python"]
    return "\n".join(
        [*lines, "", f"{found} the band of the reference run: {seeds} seeds, torch {torch}, Python {python}."]
    )
