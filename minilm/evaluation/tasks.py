"""Which tasks there are: what a model reads, what it predicts, and how it is scored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Form = Literal["classification", "regression", "tokens", "answers"]
Scores = dict[str, dict[str, float]]
"""Of a model on a task: evaluated split -> metric -> value, times 100."""


@dataclass(frozen=True)
class Task:
    """What is predicted from which columns.

    Attributes:
        name: what `--tasks` and the table call it.
        form: "classification" (a class of one text or a pair), "regression" (a number), "tokens" (a class of each
            word), "answers" (a span of the context, or none).
        texts: the columns that are read: one, two of a pair, the words of "tokens", question and context of "answers".
        label: the column that is predicted.
        metrics: names in `minilm.evaluation.metrics`; the first is the task's score in the table.
        evaluated: the splits that are scored, in this order.
        small: whether the papers train it for more epochs (3, 5 or 10).
        hub: name and configuration of the data set on the hub, for tasks that no folder holds.
    """

    name: str
    form: Form
    texts: tuple[str, ...]
    label: str
    metrics: tuple[str, ...]
    evaluated: tuple[str, ...] = ("validation",)
    small: bool = False
    hub: tuple[str, str | None] | None = None


def _glue(
    name: str,
    texts: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    form: Form = "classification",
    evaluated: tuple[str, ...] = ("validation",),
    small: bool = False,
) -> Task:
    return Task(name, form, texts, "label", metrics, evaluated, small, ("nyu-mll/glue", name))


_PAIR = ("sentence1", "sentence2")

# Metrics as in the GLUE paper's table 1 (Wang et al., 2019), the one that the MiniLM papers report first.
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _glue("sst2", ("sentence",)),
        _glue("mnli", ("premise", "hypothesis"), evaluated=("validation_matched", "validation_mismatched")),
        _glue("qnli", ("question", "sentence")),
        _glue("qqp", ("question1", "question2"), ("accuracy", "f1")),
        _glue("cola", ("sentence",), ("matthews", "accuracy"), small=True),
        _glue("rte", _PAIR, small=True),
        _glue("mrpc", _PAIR, ("f1", "accuracy"), small=True),
        _glue("stsb", _PAIR, ("spearman", "pearson"), form="regression", small=True),
        _glue("wnli", _PAIR, small=True),
        Task("squad", "answers", ("question", "context"), "answers", ("f1", "exact"), hub=("rajpurkar/squad", None)),
        Task(
            "squad_v2", "answers", ("question", "context"), "answers", ("f1", "exact"), hub=("rajpurkar/squad_v2", None)
        ),
        Task("trec", "classification", ("text",), "coarse_label", ("accuracy",), evaluated=("test",)),
    )
}
