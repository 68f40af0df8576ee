"""Which tasks are evaluated; those of one's own are folders of task data, their columns found or named."""

from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, List, Value

from minilm.errors import UsageError
from minilm.evaluation.task_files import read_split, split_files
from minilm.evaluation.tasks import TASKS, Form, Task

LABEL = "label"
TEXTS = (
    ("tokens",),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
MOST_CLASSES = 256  # of whole numbers, without --form
_METRICS: dict[Form, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "regression": ("spearman", "pearson"),
    "tokens": ("accuracy",),
}


class Columns(NamedTuple):
    """What a user has named of a task; None is found."""

    texts: tuple[str, ...] | None = None
    label: str | None = None
    form: Form | None = None


def find_task(name: str, data_dir: Path | None, columns: Columns) -> Task:
    """The built-in task of that name, or one's own in `data_dir`. Raises `UsageError` if there is neither."""
    if name in TASKS:
        return TASKS[name]
    if data_dir is not None and (data_dir / name).is_dir():
        return own_task(name, data_dir / name, columns)
    there = f"; {str(data_dir)!r} holds {', '.join(task_folders(data_dir)) or 'no folder'}" if data_dir else ""
    raise UsageError(f"there is no task {name!r}: built in are {', '.join(TASKS)}{there}")


def task_folders(data_dir: Path) -> list[str]:
    """The folders of tasks: the built-in ones in their order, then others by name.

    Raises:
        UsageError: `data_dir` is no folder.
    """
    if not data_dir.is_dir():
        raise UsageError(f"--data_dir {str(data_dir)!r} is no folder")
    names = sorted(path.name for path in data_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [*(name for name in TASKS if name in names), *(name for name in names if name not in TASKS)]


def own_task(name: str, folder: Path, columns: Columns) -> Task:
    """The task of a folder, told by the first of its splits.

    Text is in columns of a usual name (TEXTS), or in the only one that holds text. A label is text, true or false, a
    class or a whole number: "classification"; another number: "regression"; a list: "tokens". Scored is what is called
    validation, or else test.

    Raises:
        UsageError: no split; no column of the name; columns whose use is not plain.
    """
    files = split_files(folder)
    if not files:
        raise UsageError(
            f"{str(folder)!r} holds no task: no train, validation or test split as .parquet, .csv, .tsv or .json(l)"
        )
    label = columns.label or LABEL
    split = "train" if "train" in files else next(iter(files))
    records = read_split(files[split], label)
    where = f"the split {split!r} of {str(folder)!r}"
    for column in (label, *(columns.texts or ())):
        if column not in records.column_names:
            flag = "--label_column" if column == label else "--text_columns"
            raise UsageError(f"{where} has no column {column!r}: choose with {flag} from {records.column_names}")
    form = columns.form or _form(records, label, where)
    if form == "tokens" and not isinstance(records.features[label], List):
        raise UsageError(
            f"--form tokens needs a list of labels in each record: the column {label!r} of {where} holds "
            f"{_kind(records, label)}"
        )
    texts = columns.texts or _texts(records, label, where)
    evaluated = tuple(name for name in files if name.startswith("validation")) or ("test",)
    is_bio = form == "tokens" and "O" in _class_names(records, label)
    return Task(name, form, texts, label, ("entity_f1",) if is_bio else _METRICS[form], evaluated)


def _form(records: Dataset, label: str, where: str) -> Form:
    feature, kind = records.features[label], _kind(records, label)
    if isinstance(feature, List):
        return "tokens"
    if isinstance(feature, ClassLabel) or kind in ("string", "large_string", "bool"):
        return "classification"
    if kind.startswith("float"):
        return "regression"
    if kind.startswith(("int", "uint")):
        if (count := len(records.unique(label))) > MOST_CLASSES:
            raise UsageError(
                f"the column {label!r} of {where} has {count:,} different whole numbers: say whether they are classes, "
                "--form classification, or amounts, --form regression"
            )
        return "classification"
    raise UsageError(f"the column {label!r} of {where} holds {kind}, which is no label")


def _kind(records: Dataset, label: str) -> str:
    """Of what the labels are."""
    feature = records.features[label]
    return str(feature.dtype if isinstance(feature, Value) else feature)


def _texts(records: Dataset, label: str, where: str) -> tuple[str, ...]:
    names = records.column_names
    for usual in TEXTS:
        if set(usual) <= set(names):
            return usual
    found = [name for name in names if name != label and _is_text(records.features[name])]
    if len(found) != 1:
        raise UsageError(f"which columns of {where} are read is not plain: choose with --text_columns from {names}")
    return (found[0],)


def _is_text(feature: Any) -> bool:
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _class_names(records: Dataset, label: str) -> set[str]:
    """Of words."""
    feature = records.features[label].feature
    if isinstance(feature, ClassLabel):
        return set(feature.names)
    return {name for names in records[label] for name in names if isinstance(name, str)}
