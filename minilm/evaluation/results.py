"""What a protocol says of models on tasks, with the sentences and settings that belong to its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minilm.errors import UsageError
from minilm.evaluation.cells import Cells
from minilm.evaluation.judged import fingerprint_model
from minilm.evaluation.mteb_tasks import MtebTask
from minilm.evaluation.probes import (
    Probe,
    ProbeSettings,
    describe,
    is_by_cosine,
    probe_all,
    probe_of,
    why_no_probe,
)
from minilm.evaluation.protocols import PROTOCOLS, Model, explain, is_done, outcomes, plan, run_all
from minilm.evaluation.settings import Settings
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.tasks import Form, Scores

PROBE = "probe"
_VECTORS: tuple[Form, ...] = ("classification", "regression")
FORMS: Mapping[str, tuple[Form, ...]] = {PROBE: _VECTORS, **dict.fromkeys(PROTOCOLS, (*_VECTORS, "tokens", "answers"))}


@dataclass(frozen=True)
class Results:
    """Of one protocol.

    Attributes:
        scores: model -> name of the task -> scores.
        how: what was done, in sentences for the reader of the table.
        settings: JSON-able.
        chosen: model -> name of the task -> what was selected, and the seeds' scores; empty where nothing was.
        train_records: name of the task -> how many records are learnt from; 0 where nothing is learnt.
    """

    scores: dict[str, dict[str, Scores]]
    how: str
    settings: dict[str, Any]
    chosen: dict[str, dict[str, Any]]
    train_records: dict[str, int]


def check_task(protocol: str, data: TaskData) -> None:
    """Raises `UsageError` for a task that the protocol cannot judge."""
    if protocol == PROBE:
        if why := why_no_probe(data):
            raise UsageError(why)
    elif not len(data.train):
        raise UsageError(f"{data.task.name!r} has no train split to fine-tune on")


def probe_results(
    models: Mapping[str, str],
    tasks: Sequence[TaskData],
    of_mteb: Sequence[MtebTask],
    settings: ProbeSettings,
    cells: Cells,
) -> Results:
    """Of the protocol "probe"; `models` are names in the table with what loads them."""
    probes = [probe_of(data, settings) for data in tasks]
    probes += [Probe(task.name, task.identity, task.scores) for task in of_mteb]
    scores = probe_all(models, probes, settings, cells)
    records = _records(tasks, settings.max_train_records)
    records |= {data.task.name: 0 for data in tasks if is_by_cosine(data.task)}
    return Results(scores, describe(settings), asdict(settings), {}, records)


def fine_tuned_results(
    protocol: str, models: Mapping[str, str], tasks: Sequence[TaskData], settings: Settings, cells: Cells
) -> Results:
    """Of the protocols "quick" and "paper"; `models` are names in the table with what loads them."""
    named = [Model(name, source, fingerprint_model(source)) for name, source in models.items()]
    runs = plan(protocol, named, {data.fingerprint: data for data in tasks}, settings)
    print(f"{len(runs)} runs, {sum(is_done(run, cells) for run in runs)} of them done", flush=True)
    run_all(runs, cells)
    found = outcomes(runs, cells)
    scores = {
        model: {data.task.name: of_tasks[data.task.name].scores for data in tasks} for model, of_tasks in found.items()
    }
    chosen = {model: {task: asdict(outcome) for task, outcome in of_tasks.items()} for model, of_tasks in found.items()}
    most = runs[0].settings.max_train_records
    return Results(scores, explain(protocol, settings), asdict(settings), chosen, _records(tasks, most))


def _records(tasks: Sequence[TaskData], most: int | None) -> dict[str, int]:
    return {data.task.name: min(len(data.train), most or len(data.train)) for data in tasks}
