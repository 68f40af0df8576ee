"""The records of a task, read and checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from minilm.data.faults import DataError
from minilm.data.fingerprints import fingerprint_texts
from minilm.errors import UsageError, reason
from minilm.evaluation.answer_records import check_answers, questions_of
from minilm.evaluation.task_files import read_split, split_files
from minilm.evaluation.task_labels import are_hidden, to_learn
from minilm.evaluation.tasks import Task


@dataclass(frozen=True)
class TaskData:
    """A task with its records; every one has a label.

    Attributes:
        train: `task.texts` and `task.label` as columns; classes are numbers from 0, a list of them for "tokens". Empty
            where there is no such split.
        evaluated: the same columns, by split, as `task.evaluated` names them.
        classes: names of the classes by number; empty for numbers and answers.
    """

    task: Task
    train: Dataset
    evaluated: dict[str, Dataset]
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """A hex digest of all that is read of it."""
        splits = [self.train, *self.evaluated.values()]
        records = (repr(list(record.values())) for split in splits for record in split)
        return fingerprint_texts([repr(self.task), repr(self.classes), repr(list(map(len, splits))), *records])

    def with_train_records(self, most: int, seed: int) -> "TaskData":
        """With at most so many records to train on, drawn from the seed, in their order."""
        if len(self.train) <= most:
            return self
        drawn = np.random.default_rng(seed).permutation(len(self.train))[:most]
        return replace(self, train=self.train.select(np.sort(drawn)))


def read_task(task: Task, data_dir: Path | None) -> TaskData:
    """The task's records from DIR/NAME, or without a folder from the hub.

    A task without the split that it is scored on is scored on `test`, if that has labels. Labels that are text are
    numbered by their sorted names.

    Raises:
        UsageError: neither such a folder nor a data set on the hub; no split to score on; no such column.
        DataError: a record without text or label, hidden labels (-1), a class that is not among the training records.
    """
    where, splits = _from_hub(task) if data_dir is None else _from_files(task, data_dir)
    scored = [name for name in task.evaluated if name in splits]
    if not scored and "test" in splits and not are_hidden(splits["test"], task.label):
        scored = ["test"]
    if not scored:
        raise UsageError(
            f"{where} has no {' or '.join(task.evaluated)} split and no labelled test split to score {task.name!r} on: "
            f"its splits are {', '.join(splits) or 'none'}"
        )
    used = {name: splits[name] for name in ("train", *scored) if name in splits}
    if task.form == "answers":
        used = {name: questions_of(split, f"the split {name!r} of {where}") for name, split in used.items()}
    for name, split in used.items():
        for column in (*task.texts, task.label):
            if column not in split.column_names:
                raise UsageError(
                    f"the task {task.name!r} reads the column {column!r}, which the split {name!r} of {where} lacks: "
                    f"it has {split.column_names}"
                )
        _check_texts(task, split, f"the split {name!r} of {where}")
    if task.form == "answers":
        for name, split in used.items():
            check_answers(split, f"the split {name!r} of {where}")
        columns = {name: split.select_columns([*task.texts, task.label]) for name, split in used.items()}
        classes: tuple[str, ...] = ()
    else:
        labels, classes = to_learn(task, used, where)
        columns = {
            name: Dataset.from_dict({**{text: split[text][:] for text in task.texts}, task.label: labels[name]})
            for name, split in used.items()
        }
    nothing = columns[scored[0]].select([])
    return TaskData(task, columns.pop("train", nothing), {name: columns[name] for name in scored}, classes)


def _from_files(task: Task, data_dir: Path) -> tuple[str, dict[str, Dataset]]:
    folder = data_dir / task.name
    if not folder.is_dir():
        there = sorted(path.name for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
        raise UsageError(
            f"--data_dir {str(data_dir)!r} has no folder {task.name!r}: it holds {', '.join(there) or 'none'}"
        )
    used = ("train", "test", *task.evaluated)
    files = split_files(folder)
    return repr(str(folder)), {name: read_split(files[name], task.label) for name in files if name in used}


def _from_hub(task: Task) -> tuple[str, Mapping[str, Dataset]]:
    if task.hub is None:
        raise UsageError(f"the task {task.name!r} is read from files: say with --data_dir where its folder is")
    name, configuration = task.hub
    where = f"{name} ({configuration})" if configuration else name
    try:
        return where, dict(load_dataset(name, configuration))
    except Exception as error:
        raise UsageError(
            f"cannot get {where} from the hub for the task {task.name!r} ({reason(error)}): say with --data_dir where "
            f"a folder {task.name!r} of train and {task.evaluated[0]} files is"
        ) from error


def _check_texts(task: Task, split: Dataset, where: str) -> None:
    for column in task.texts:
        for row, value in enumerate(split[column], 1):
            words = value if task.form == "tokens" and isinstance(value, list) else [value]
            if not words or not all(isinstance(word, str) for word in words):
                what = "words" if task.form == "tokens" else "text"
                raise DataError(f"{where} holds {value!r}, not {what}, in the column {column!r} of record {row}")
