"""The labels of a task's records, checked, and as they are learnt: numbers of classes, or amounts."""

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import ClassLabel, Dataset, List

from minilm.data.faults import DataError
from minilm.evaluation.tasks import Task

HIDDEN = -1  # as test splits of GLUE have it


def are_hidden(split: Dataset, label: str) -> bool:
    """Whether no record has a label."""
    return label not in split.column_names or all(value in (None, HIDDEN) for value in split[label])


def to_learn(task: Task, splits: Mapping[str, Dataset], where: str) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """The labels of each split as `TaskData` has them, and the names of the classes by number.

    Raises:
        DataError: a record without a label, hidden labels, another count of labels than of words, a class that no
            record of `train` has, an amount that is no number.
    """
    values = {name: list(split[task.label]) for name, split in splits.items()}
    for name, column in values.items():
        _check(task, splits[name], column, f"the split {name!r} of {where}")
    if task.form == "regression":
        return {name: [float(value) for value in column] for name, column in values.items()}, ()
    distinct = {name: {*_flat(column)} for name, column in values.items()}
    for name, found in distinct.items():
        if extra := sorted(found - distinct.get("train", found), key=str):
            raise DataError(f"the split {name!r} of {where} has the label {extra[0]!r}, which no record of 'train' has")
    feature = next(iter(splits.values())).features[task.label]
    feature = feature.feature if isinstance(feature, List) else feature
    if isinstance(feature, ClassLabel):
        return values, tuple(feature.names)
    classes = sorted(set.union(*distinct.values()))
    number = {name: index for index, name in enumerate(classes)}
    if task.form == "tokens":
        return {name: [[number[x] for x in words] for words in column] for name, column in values.items()}, tuple(
            map(str, classes)
        )
    return {name: [number[value] for value in column] for name, column in values.items()}, tuple(map(str, classes))


def _check(task: Task, split: Dataset, labels: list[Any], where: str) -> None:
    if labels and are_hidden(split, task.label):
        raise DataError(f"the labels of {where} are hidden (all are {labels[0]}): nothing can be scored by them")
    is_class_label = isinstance(split.features[task.label], ClassLabel)
    for row, value in enumerate(labels, 1):
        if value is None or value != value or (is_class_label and value == HIDDEN):
            raise DataError(f"record {row} of {where} has no label: it holds {value} in the column {task.label!r}")
        if task.form == "tokens":
            words = len(split[row - 1][task.texts[0]])
            if not isinstance(value, list) or len(value) != words:
                raise DataError(f"record {row} of {where} has {words} words and, as labels, {value!r}")
        elif task.form == "regression" and not isinstance(value, int | float):
            raise DataError(f"record {row} of {where} has the label {value!r}, which is no number")
        elif task.form == "classification" and not isinstance(value, int | str):
            raise DataError(
                f"record {row} of {where} has the label {value!r}, which is no class: text or whole numbers"
            )


def _flat(column: list[Any]) -> Iterable[Any]:
    return (each for value in column for each in (value if isinstance(value, list) else [value]))
