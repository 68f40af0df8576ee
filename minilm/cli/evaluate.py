"""`minilm-eval`: judges models by what they are worth on tasks, and how small and fast they are."""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.cli.demo import TEACHER_NAME, docstrings, teacher_folder
from minilm.cli.terminal import OneLineErrors, fail, not_installed, patient_streams, positive
from minilm.errors import NonFiniteError, UsageError
from minilm.escapes import printable

if TYPE_CHECKING:
    from minilm.evaluation.mteb_tasks import MtebTask
    from minilm.evaluation.own_tasks import Columns
    from minilm.evaluation.results import Results
    from minilm.evaluation.task_data import TaskData
    from minilm.evaluation.tasks import Task

PROGRAM = "minilm-eval"
NEEDED = ("transformers", "datasets", "matplotlib", "sentence_transformers", "sklearn", "scipy")
DESCRIPTION = """\
Scores models on GLUE and on tasks of one's own, beside their size and speed: a table, eval.json, eval.md and eval.png.
The protocol "probe" judges sentence vectors of the models as they are, in minutes; "quick" and "paper" fine-tune them.
What is finished stays in OUTPUT_DIR/cells, and the same command goes on from there.
"""
OF_MTEB = "mteb:"
LIMITS = ("max_length", "max_train_records")
SPEED_LENGTH = 128  # tokens of the texts that the models are timed on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns its exit code.

    0: done. 1: it cannot be done here (a package, a file or a folder that is not there, a full disk, data that cannot
    be read). 2: a wrong flag or value, a model that does not load. 130: stopped by Ctrl-C. Each but the first says why
    in one line.
    """
    with patient_streams():
        arguments = _parse(argv)
        if missing := not_installed(NEEDED, "eval"):
            return fail(PROGRAM, missing, 1)
        from minilm.data.faults import DataError
        from minilm.training.folders import OccupiedError

        try:
            print(_list_tasks(arguments) if arguments.tasks == ["list"] else _evaluate(arguments))
        except KeyboardInterrupt:
            kept = "what is finished is kept, and the same command goes on"
            return fail(PROGRAM, f"interrupted; {kept}", 128 + signal.SIGINT)
        except (OSError, DataError, ModuleNotFoundError, NonFiniteError, OccupiedError) as error:
            return fail(PROGRAM, str(error), 1)
        except UsageError as error:
            return fail(PROGRAM, str(error), 2)
    return 0


def _evaluate(arguments: argparse.Namespace) -> str:
    """The table and where the files are."""
    # Here and not above: they take seconds, and wrong flags must not wait.
    from transformers.utils import logging

    from minilm.cli.evaluation_report import publish_evaluation
    from minilm.evaluation.judged import TEXTS, size_of, some_texts, texts_per_second, to_be_timed
    from minilm.evaluation.table import Judged
    from minilm.training.folders import claimed

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of weights
    models = _models(arguments.models)
    of_mteb = _mteb_tasks(arguments)
    tasks, left_out = _read_tasks(arguments)
    for name, reason in left_out.items():
        print(printable(f"left out {name}: {reason}"), flush=True)
    sizes = {label: size_of(name) for label, name in models.items()}
    with claimed(arguments.output_dir):
        results = _results(arguments, models, tasks, of_mteb)
        texts = some_texts(tasks) if tasks else [(text,) for text in docstrings()[:TEXTS]]
        timed = [to_be_timed(name, texts, arguments.max_length or SPEED_LENGTH) for name in models.values()]
        speeds = dict(zip(models, texts_per_second(timed), strict=True))
        judged = [Judged(label, sizes[label], speeds[label], results.scores[label]) for label in models]
        return publish_evaluation(
            arguments.output_dir, arguments.protocol, judged, models, tasks, of_mteb, left_out, results
        )


def _results(
    arguments: argparse.Namespace, models: dict[str, str], tasks: list["TaskData"], of_mteb: list["MtebTask"]
) -> "Results":
    from minilm.evaluation.cells import Cells
    from minilm.evaluation.probes import ProbeSettings
    from minilm.evaluation.results import PROBE, fine_tuned_results, probe_results
    from minilm.evaluation.settings import Settings

    cells = Cells(arguments.output_dir)
    given = {name: value for name in LIMITS if (value := getattr(arguments, name)) is not None}
    if arguments.protocol == PROBE:
        return probe_results(models, tasks, of_mteb, ProbeSettings(**given), cells)
    return fine_tuned_results(arguments.protocol, models, tasks, Settings(**given, bf16=arguments.bf16), cells)


def _models(names: Sequence[str]) -> dict[str, str]:
    """What each model is called in the table, and the folder or name that loads it."""
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"the model {double!r} is named twice")
    folders = [str(teacher_folder()) if _is_demonstrations(name) else name for name in names]
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in names]
    labels = [name if short.count(label) > 1 else label for name, label in zip(names, short, strict=True)]
    return dict(zip(labels, folders, strict=True))


def _is_demonstrations(name: str) -> bool:
    return name == TEACHER_NAME and not Path(name).exists()


def _read_tasks(arguments: argparse.Namespace) -> tuple[list["TaskData"], dict[str, str]]:
    """The tasks with their records; where none is named, all that can be evaluated, and why the others cannot."""
    from minilm.evaluation.own_tasks import find_task, task_folders
    from minilm.evaluation.results import FORMS, check_task
    from minilm.evaluation.task_data import read_task
    from minilm.evaluation.tasks import TASKS

    data_dir, named = arguments.data_dir, arguments.tasks is not None
    on_the_hub = [task.name for task in TASKS.values() if task.hub and task.form in FORMS[arguments.protocol]]
    names = arguments.tasks if named else task_folders(data_dir) if data_dir else on_the_hub
    names = [name for name in names if not name.startswith(OF_MTEB)]
    tasks, left_out = [], {}
    for name in names:
        try:
            data = read_task(find_task(name, data_dir, _columns(arguments)), data_dir)
            check_task(arguments.protocol, data)
            tasks.append(data)
        except UsageError as error:
            if named or not data_dir:
                raise
            left_out[name] = str(error)
    if not tasks and not named:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise UsageError(f"--data_dir {str(data_dir)!r} holds no task{reasons}")
    return tasks, left_out


def _mteb_tasks(arguments: argparse.Namespace) -> list["MtebTask"]:
    names = [name for name in arguments.tasks or [] if name.startswith(OF_MTEB)]
    if names and arguments.protocol != "probe":
        raise UsageError(f"{names[0]!r} is of frozen vectors: --protocol probe, not {arguments.protocol}")
    if not names:
        return []
    from minilm.evaluation.mteb_tasks import find_mteb_task

    return [find_mteb_task(name) for name in names]


def _list_tasks(arguments: argparse.Namespace) -> str:
    """A table of the built-in tasks and those of --data_dir."""
    from minilm.evaluation.own_tasks import find_task, task_folders
    from minilm.evaluation.table import markdown_table
    from minilm.evaluation.tasks import TASKS

    there = task_folders(arguments.data_dir) if arguments.data_dir else []
    rows, others = [], []
    for name in dict.fromkeys([*TASKS, *there]):
        try:
            task = find_task(name, arguments.data_dir, _columns(arguments))
            rows.append([*_described(task), "yes" if name in there else ""])
        except UsageError as error:
            others.append(printable(f"no task, {name}: {error}"))
    where = str(arguments.data_dir or "a folder (--data_dir)")
    return "\n".join([*markdown_table(["task", "predicts", "reads", "metrics", f"in {where}"], rows), *others])


def _described(task: "Task") -> list[str]:
    return [task.name, f"{task.label} ({task.form})", ", ".join(task.texts), ", ".join(task.metrics)]


def _columns(arguments: argparse.Namespace) -> "Columns":
    from minilm.evaluation.own_tasks import Columns

    return Columns(arguments.text_columns and tuple(arguments.text_columns), arguments.label_column, arguments.form)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(prog=PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"folder or name of a model, or {TEACHER_NAME}; speeds are set beside the first one's",
    )
    add(
        "--tasks",
        type=_names,
        help="names with commas between, by default all that can be done; list shows them; mteb:NAME is one of MTEB",
    )
    add(
        "--data_dir",
        type=Path,
        help="where each task is a folder of train, validation and test files (.parquet, .csv, .tsv, .json, .jsonl); "
        "without it GLUE comes from the hub",
    )
    add(
        "--protocol",
        choices=["probe", "quick", "paper"],
        default="probe",
        help="frozen vectors; one fine-tuning of each model on each task; the papers' grid of them",
    )
    add("--output_dir", type=Path, help="where the results go")
    add("--max_length", type=positive, help="tokens of a text (128; where answers are looked for, 384)")
    add(
        "--max_train_records",
        type=positive,
        help="of a task that are learnt from, drawn by a seed (probe: 10,000, quick: 2,000, paper: all)",
    )
    add("--bf16", action="store_true", help="fine-tunes with products of matrices in bfloat16")
    add("--text_columns", type=_names, help="of tasks of one's own: the one or two columns that are read")
    add("--label_column", help="of tasks of one's own: what is predicted")
    add(
        "--form",
        choices=["classification", "regression", "tokens"],
        help="of tasks of one's own, where the labels do not tell it",
    )
    arguments = parser.parse_args(argv)
    if arguments.tasks != ["list"]:
        for name, value in (("MODEL", arguments.models), ("--output_dir", arguments.output_dir)):
            if not value:
                parser.error(f"the following arguments are required: {name}")
    if arguments.bf16 and arguments.protocol == "probe":
        parser.error("--bf16 is of fine-tuning: --protocol quick or paper")
    return arguments


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different names with commas between")
    return names
