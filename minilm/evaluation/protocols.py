"""Which fine-tunings a protocol asks for, run one after the other, and what comes out of them.

Each run is a JSON file in the output folder, whole or not there: a grid that was stopped goes on where it was. A run is
found by what it was made of (the model's content, the task's records, the settings), never by names alone.
"""

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets.utils import tqdm

from minilm.evaluation.finetuning import finetune
from minilm.evaluation.settings import Settings
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.tasks import Scores, Task

RUNS = "runs"  # the folder of their files


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


@dataclass(frozen=True)
class Run:
    """One fine-tuning of a protocol.

    Attributes:
        model: its name or folder.
        model_fingerprint, task_fingerprint: what they are, told by their content.
    """

    model: str
    model_fingerprint: str
    data: TaskData
    task_fingerprint: str
    settings: Settings

    @property
    def identity(self) -> dict[str, Any]:
        """All that its scores come from, but for the device."""
        settings = asdict(self.settings)
        del settings["use_cpu"]
        return {"model": self.model_fingerprint, "task": self.task_fingerprint, "settings": settings}


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
    protocol: str, models: Mapping[str, str], tasks: Mapping[str, TaskData], settings: Settings | None = None
) -> list[Run]:
    """The runs in their order: one seed of everything first, and of that one setting of all tasks and models.

    Args:
        models: names or folders, with their fingerprints.
        tasks: by their fingerprints.
        settings: what the protocol does not say: sizes of batches, lengths, device.
    """
    grid, given = PROTOCOLS[protocol], settings or Settings()
    runs = []
    for seed in grid.seeds:
        for place in range(len(grid.epochs)):
            for rate in grid.learning_rates:
                for task_fingerprint, data in tasks.items():
                    of_run = replace(
                        given,
                        learning_rate=rate,
                        epochs=(grid.small_epochs if data.task.small else grid.epochs)[place],
                        seed=seed,
                        max_length=given.length(data.task.form),
                        max_train_records=given.max_train_records or grid.max_train_records,
                    )
                    runs += [Run(name, model, data, task_fingerprint, of_run) for name, model in models.items()]
    return runs


def run_all(runs: Sequence[Run], folder: Path) -> None:
    """Does the runs that `folder` does not have yet; may be stopped at any time and called again.

    Raises:
        UsageError, NonFiniteError: as `finetune`.
    """
    missing = [run for run in runs if read_scores(run, folder) is None]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit=" runs", desc="fine-tuning") as bar:
        for run in missing:
            if read_scores(run, folder) is None:  # else the same model is there under another name
                begun = time.monotonic()
                with tempfile.TemporaryDirectory() as scratch:
                    scores = finetune(run.model, run.data, run.settings, Path(scratch))
                _write(run, folder, scores, time.monotonic() - begun)
            bar.update()


def read_scores(run: Run, folder: Path) -> Scores | None:
    """Of a run that is done; None for one that is not."""
    try:
        content = json.loads(_path(run, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not whole
        return None
    scores: Scores = content["scores"]
    return scores


def outcomes(runs: Sequence[Run], folder: Path) -> dict[str, dict[str, Outcome]]:
    """What the runs that are done say: model -> name of the task -> outcome. One without any run is left out."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.model, run.data.task.name), []).append(run)
    found: dict[str, dict[str, Outcome]] = {}
    for (model, task), group in grouped.items():
        done = [(run.settings, scores) for run in group if (scores := read_scores(run, folder)) is not None]
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


def _path(run: Run, folder: Path) -> Path:
    digest = hashlib.sha256(json.dumps(run.identity, sort_keys=True).encode()).hexdigest()
    return folder / RUNS / f"{run.data.task.name}-{digest[:24]}.json"


def _write(run: Run, folder: Path, scores: Scores, seconds: float) -> None:
    path = _path(run, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "scores": scores,
        "model": run.model,
        "made of": run.identity,
        "seconds": round(seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    begun = path.with_suffix(".part")
    begun.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(begun, path)
