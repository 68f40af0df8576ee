"""Which fine-tunings a protocol asks for, run one after the other, and what comes out of them.

Each run is a cell, told by what it was made of (the model's content, the task's records, the settings), not by names: a
grid that was stopped goes on where it was.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from datasets.utils import tqdm

from minilm.evaluation.cells import Cells, Key
from minilm.evaluation.finetuning import finetune
from minilm.evaluation.settings import Settings
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.tasks import Scores, Task


@dataclass(frozen=True)
class Protocol:
    """A grid: every learning rate with every number of epochs, each with every seed.

    Attributes:
        small_epochs: instead of `epochs`, for tasks that are `small`.
        max_train_records: of each task, unless settings say otherwise; None for all.
    """

    learning_rates: tuple[float, ...]
    epochs: tuple[int, ...]
    small_epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    max_train_records: int | None = None


PROTOCOLS: Mapping[str, Protocol] = {
    "quick": Protocol((5e-5,), (3,), (3,), (0,), max_train_records=2000),
    "paper": Protocol((2e-5, 3e-5, 4e-5, 5e-5), (3, 4, 5), (3, 5, 10), (0, 1, 2, 3)),
}


class Model(NamedTuple):
    """What the table calls it, the name or folder that loads it, and a digest of its content."""

    name: str
    source: str
    fingerprint: str


@dataclass(frozen=True)
class Run:
    """One fine-tuning of a protocol; `task` is the digest of the task's records."""

    model: Model
    task: str
    data: TaskData
    settings: Settings

    @property
    def key(self) -> Key:
        """All that its scores come from, but for the device."""
        settings = asdict(self.settings)
        del settings["use_cpu"]
        return {"protocol": "fine-tuning", "model": self.model.fingerprint, "task": self.task, "settings": settings}


@dataclass(frozen=True)
class Outcome:
    """What a protocol says of a model on a task.

    Attributes:
        scores: the median over the seeds, of each metric, with the best setting.
        by_seed: the scores that these are the medians of.
        learning_rate, epochs: the best setting: that of the highest median of the first metric on the first split.
        done, planned: runs; where some are missing, the best is of the settings that have the most seeds.
    """

    scores: Scores
    by_seed: dict[int, Scores]
    learning_rate: float
    epochs: int
    done: int
    planned: int


def plan(
    protocol: str, models: Sequence[Model], tasks: Mapping[str, TaskData], settings: Settings | None = None
) -> list[Run]:
    """The runs in their order: one seed of everything first, and of that one setting of all tasks and models.

    Args:
        tasks: by the digests of their records.
        settings: what the protocol does not say: sizes of batches, lengths, device.
    """
    grid, given = PROTOCOLS[protocol], settings or Settings()
    runs = []
    for seed in grid.seeds:
        for place in range(len(grid.epochs)):
            for rate in grid.learning_rates:
                for task, data in tasks.items():
                    of_run = replace(
                        given,
                        learning_rate=rate,
                        epochs=(grid.small_epochs if data.task.small else grid.epochs)[place],
                        seed=seed,
                        max_length=given.length(data.task.form),
                        max_train_records=given.max_train_records or grid.max_train_records,
                    )
                    runs += [Run(model, task, data, of_run) for model in models]
    return runs


def is_done(run: Run, cells: Cells) -> bool:
    """Whether its scores are there."""
    return cells.get(run.key) is not None


def run_all(runs: Sequence[Run], cells: Cells) -> None:
    """Does the runs that are not done yet; may be stopped at any time and called again.

    Raises:
        UsageError, NonFiniteError: as `finetune`.
    """
    missing = [run for run in runs if not is_done(run, cells)]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit=" runs", desc="fine-tuning") as bar:
        for run in missing:
            if not is_done(run, cells):  # else the same model was there under another name
                begun = time.monotonic()
                with tempfile.TemporaryDirectory() as scratch:
                    scores = finetune(run.model.source, run.data, run.settings, Path(scratch))
                made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
                seconds = round(time.monotonic() - begun, 1)
                names = {"model": run.model.name, "task": run.data.task.name}
                cells.put(run.key, {"scores": scores, **names, "seconds": seconds, "versions": made_by})
            bar.update()


def outcomes(runs: Sequence[Run], cells: Cells) -> dict[str, dict[str, Outcome]]:
    """What the runs that are done say: model -> name of the task -> outcome. One without any run is left out."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.model.name, run.data.task.name), []).append(run)
    found: dict[str, dict[str, Outcome]] = {}
    for (model, task), group in grouped.items():
        done = [(run.settings, cell["scores"]) for run in group if (cell := cells.get(run.key))]
        if done:
            found.setdefault(model, {})[task] = _outcome(done, group[0].data.task, len(group))
    return found


def _outcome(done: Sequence[tuple[Settings, Scores]], task: Task, planned: int) -> Outcome:
    by_setting: dict[tuple[float, int], dict[int, Scores]] = {}
    for settings, scores in done:
        by_setting.setdefault((settings.learning_rate, settings.epochs), {})[settings.seed] = scores
    most = max(map(len, by_setting.values()))
    medians = {setting: _medians(seeds) for setting, seeds in by_setting.items() if len(seeds) == most}

    def selected_on(setting: tuple[float, int]) -> float:
        return next(iter(medians[setting].values()))[task.metrics[0]]

    best = max(medians, key=selected_on)  # of equal ones the first
    return Outcome(medians[best], by_setting[best], *best, len(done), planned)


def _medians(by_seed: Mapping[int, Scores]) -> Scores:
    first, *_ = by_seed.values()
    return {
        split: {metric: statistics.median(scores[split][metric] for scores in by_seed.values()) for metric in metrics}
        for split, metrics in first.items()
    }


def explain(protocol: str, settings: Settings | None = None) -> str:
    """What is done and what the numbers are, in sentences for the reader of a table."""
    grid, given = PROTOCOLS[protocol], settings or Settings()
    most = given.max_train_records or grid.max_train_records
    records = f"at most {most:,} training records, drawn with all classes in their shares" if most else "all records"
    how = f"{records}; batches of {given.batch_size}; the weights after the last step are scored"
    rates = " or ".join(f"{rate:g}" for rate in grid.learning_rates)
    if len(grid.learning_rates) == len(grid.epochs) == len(grid.seeds) == 1:
        return (
            f"Each model is fine-tuned on each task once, with a new head: learning rate {rates}, {grid.epochs[0]} "
            f"epochs, seed {grid.seeds[0]}; {how}. Another seed gives other numbers, on small tasks by some points."
        )
    return (
        f"Each model is fine-tuned on each task with a new head, with every learning rate of {rates} and every number "
        f"of epochs of {_listed(grid.epochs)} (small tasks: {_listed(grid.small_epochs)}), with {len(grid.seeds)} "
        f"seeds each; {how}. A number is the median of the seeds, with the learning rate and epochs whose median is "
        "the best on the very split that is reported (the first of several), as in the MiniLM papers: it is somewhat "
        "above that on unseen data."
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
