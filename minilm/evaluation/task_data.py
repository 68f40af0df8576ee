"""The records of a task, read and checked once."""

from dataclasses import dataclass

from datasets import Dataset

from minilm.evaluation.tasks import Task


@dataclass(frozen=True)
class TaskData:
    """A task with its records; every one has a label.

    Attributes:
        train: `task.texts` and `task.label` as columns; classes are numbers from 0, a list of them for "tokens".
        evaluated: the same columns, by split, as `task.evaluated` names them.
        classes: names of the classes by number; empty for numbers and answers.
    """

    task: Task
    train: Dataset
    evaluated: dict[str, Dataset]
    classes: tuple[str, ...]
