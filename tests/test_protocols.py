"""Protocols: which runs, in which order, what a stopped grid keeps, and what is reported of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from minilm.evaluation import protocols
from minilm.evaluation.cells import Cells
from minilm.evaluation.protocols import Model, Run, explain, is_done, outcomes, plan, run_all
from minilm.evaluation.settings import Settings
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.tasks import Scores, Task

SMALL, LARGE = Model("small", "folder/small", "ssss"), Model("large", "folder/large", "llll")
MODELS = [SMALL, LARGE]


def task(name: str, small: bool = False) -> TaskData:
    records = Dataset.from_dict({"text": ["a"], "label": [0]})
    metrics = ("f1", "accuracy")
    return TaskData(Task(name, "classification", ("text",), "label", metrics, small=small), records, {}, ("x",))


TASKS = {"1": task("big"), "2": task("little", small=True)}


class Trained:
    """Stands for `finetune`; stops like Ctrl-C before the run of that number."""

    def __init__(self, stop: int = -1) -> None:
        self.settings: list[Settings] = []
        self.models: list[str] = []
        self.stop = stop

    def __call__(self, model: str, data: TaskData, settings: Settings, folder: Path) -> Scores:
        if len(self.settings) == self.stop:
            raise KeyboardInterrupt
        self.settings.append(settings)
        self.models.append(model)
        return {"validation": {"f1": 1e5 * settings.learning_rate + settings.seed, "accuracy": 50.0 - settings.seed}}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(stop: int = -1) -> Trained:
        found = Trained(stop)
        monkeypatch.setattr(protocols, "finetune", found)
        return found

    datasets.disable_progress_bars()
    yield install
    datasets.enable_progress_bars()


def test_the_grid_of_the_papers() -> None:
    runs = plan("paper", MODELS, TASKS)
    assert len(runs) == 4 * 3 * 2 * 2 * 4  # rates, numbers of epochs, tasks, models, seeds
    assert len({json.dumps(run.key) for run in runs}) == len(runs)
    epochs = {name: {run.settings.epochs for run in runs if run.data.task.name == name} for name in ("big", "little")}
    assert epochs == {"big": {3, 4, 5}, "little": {3, 5, 10}}
    assert [run.settings.seed for run in runs] == sorted(run.settings.seed for run in runs)
    assert {(run.model.name, run.data.task.name) for run in runs[:4]} == {
        (model.name, name) for model in MODELS for name in ("big", "little")
    }  # a table with every cell comes first
    assert {run.settings.max_train_records for run in runs} == {None}


def test_quick_is_one_run_of_some_records() -> None:
    runs = plan("quick", MODELS, TASKS, Settings(batch_size=8, max_length=40))
    expected = Settings(5e-5, 3, 0, batch_size=8, max_length=40, max_train_records=2000)
    assert [run.settings for run in runs] == [expected] * 4
    assert plan("quick", MODELS, TASKS)[0].settings.max_length == 128
    assert plan("quick", MODELS, TASKS, Settings(max_train_records=50))[0].settings.max_train_records == 50


def test_a_stopped_grid_goes_on(tmp_path: Path, trained: Any) -> None:
    runs = plan("paper", MODELS, TASKS)
    trained(stop=10)
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, Cells(tmp_path))
    assert sum(is_done(run, Cells(tmp_path)) for run in runs) == 10
    rest = trained()
    run_all(runs, Cells(tmp_path))
    assert rest.settings == [run.settings for run in runs[10:]]
    assert sorted({path.suffix for path in tmp_path.rglob("*") if path.is_file()}) == [".json"]
    none = trained()
    run_all(runs, Cells(tmp_path))
    assert none.settings == []
    next(tmp_path.rglob("*.json")).write_text("{")  # a disk that lost the end of a file
    one = trained()
    run_all(runs, Cells(tmp_path))
    assert len(one.settings) == 1


def test_only_the_same_model_task_and_settings_are_taken(tmp_path: Path, trained: Any) -> None:
    runs = plan("quick", MODELS, TASKS)
    trained()
    run_all(runs, Cells(tmp_path))

    def count(changed: list[Run]) -> int:
        again = trained()
        run_all(changed, Cells(tmp_path))
        return len(again.settings)

    assert count(plan("quick", [SMALL._replace(fingerprint="another"), LARGE], TASKS)) == 2
    assert count(plan("quick", MODELS, {"3": TASKS["1"], "2": TASKS["2"]})) == 2
    assert count([replace(run, settings=replace(run.settings, bf16=True)) for run in runs]) == 4
    assert count([replace(run, settings=replace(run.settings, use_cpu=True)) for run in runs]) == 0
    assert count(plan("quick", [SMALL._replace(name="renamed", source="moved")], TASKS)) == 0
    twice = plan("quick", [Model("new", "new", "n"), Model("again", "again", "n")], TASKS)
    assert count(twice) == 2  # once, not under each name


def test_the_best_setting_by_its_median_over_seeds(tmp_path: Path, trained: Any) -> None:
    runs = plan("paper", [SMALL], {"1": TASKS["1"]})
    trained()
    run_all(runs, Cells(tmp_path))
    outcome = outcomes(runs, Cells(tmp_path))["small"]["big"]
    assert (outcome.learning_rate, outcome.epochs) == (5e-5, 3)
    assert outcome.scores == {"validation": {"f1": 6.5, "accuracy": 48.5}}
    assert [outcome.by_seed[seed]["validation"]["f1"] for seed in range(4)] == [5.0, 6.0, 7.0, 8.0]
    assert (outcome.done, outcome.planned) == (48, 48)


def test_a_part_of_a_grid_is_told_as_far_as_it_goes(tmp_path: Path, trained: Any) -> None:
    runs = plan("paper", MODELS, {"1": TASKS["1"]})
    assert outcomes(runs, Cells(tmp_path)) == {}
    trained(stop=24 + 3)  # one seed of all, and of the second seed the first rate of both models and one more run
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, Cells(tmp_path))
    found = outcomes(runs, Cells(tmp_path))
    small, large = found["small"]["big"], found["large"]["big"]
    assert (small.done, small.planned, large.done) == (14, 48, 13)
    assert (small.learning_rate, sorted(small.by_seed)) == (3e-5, [0, 1])  # of those with two seeds
    assert (large.learning_rate, large.scores["validation"]["f1"]) == (2e-5, 2.5)


def test_what_is_done_is_said() -> None:
    quick = explain("quick", Settings(max_train_records=300))
    assert "learning rate 5e-05, 3 epochs, seed 0; at most 300 training records" in quick
    paper = explain("paper")
    assert "2e-05 or 3e-05 or 4e-05 or 5e-05" in paper
    assert "3, 4 or 5 (small tasks: 3, 5 or 10), with 4 seeds each; all records" in paper
    assert "best on the very split that is reported" in paper
