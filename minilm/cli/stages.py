"""The runs that one command line asks for, one after the other: teacher, assistant, student; or a task's two stages."""

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from minilm.cli.arguments import Arguments, own_arguments
from minilm.cli.flags import ObjectiveArguments
from minilm.errors import UsageError
from minilm.objectives.systems import SYSTEMS, Stage
from minilm.training.runs import METRICS, OccupiedError, check_equal, starting_point

ASSISTANT = "assistant"  # the folder of the first run, in the output folder
NO_ASSISTANT = {"assistant_num_layers": None, "assistant_hidden_size": None}
NO_SIZES: dict[str, Any] = {
    "student_num_layers": None,
    "student_hidden_size": None,
    "student_num_heads": None,
    "student_intermediate_size": None,
    "student_init_layers": None,
    "student_embedding_dim": None,
    "student_vocabulary": None,
}


def stages(arguments: Arguments) -> list[Arguments]:
    """The runs still to be done, in order: one, or two, of which the first leaves a model in a folder of its own.

    That is an assistant, which teaches the student then (MiniLM, section 3.4), or for a system of two stages the
    student itself, which goes on. When the command is resumed, a finished first run is not done again.

    Raises:
        ValueError: a checkpoint of the second run is named while the first is not finished; the finished one is of
            another teacher, size, objective or data; an assistant for a system of two stages.
        OccupiedError: there is a finished first run, and nothing is to be resumed.
    """
    first = SYSTEMS[arguments.objective.objective].first
    model = arguments.model
    if model.assistant_num_layers is None and model.assistant_hidden_size is None:
        return [arguments] if first is None else _chain(*_stage_and_task(arguments, first), arguments)
    if first is not None:
        raise UsageError(
            f"--objective {arguments.objective.objective} has two stages already: leave out --assistant_num_layers "
            "and --assistant_hidden_size"
        )
    return _chain(*_assistant_and_student(arguments), arguments)


def _assistant_and_student(arguments: Arguments) -> tuple[Arguments, Arguments]:
    model = arguments.model
    if arguments.objective.layer_map is not None:
        raise UsageError(
            f"--layer_map {arguments.objective.layer_map} names layers of one teacher, and an assistant is another: "
            "leave it out, or train the assistant in a run of its own"
        )
    sizes = NO_SIZES | {
        "student_num_layers": model.assistant_num_layers,
        "student_hidden_size": model.assistant_hidden_size,
        # Layers are the student's to take from this one.
        "student_init": "auto" if model.student_init == "layers" else model.student_init,
        "student": None,
    }
    folder = Path(str(arguments.training.output_dir)) / ASSISTANT
    first = _run(arguments, {"output_dir": str(folder), "push_to_hub": False}, NO_ASSISTANT | sizes)
    second = _run(arguments, {}, NO_ASSISTANT | {"teacher": str(folder), "teacher_layer": -1})
    return first, second


def _stage_and_task(arguments: Arguments, stage: Stage) -> tuple[Arguments, Arguments]:
    """What the first system alone takes is said to it alone."""
    if arguments.model.student_vocabulary is not None:
        raise UsageError(
            f"--student_vocabulary {arguments.model.student_vocabulary} cuts the teacher's vocabulary too, and "
            f"--objective {arguments.objective.objective} reads it again for its second run: leave it out"
        )
    folder, steps = Path(str(arguments.training.output_dir)) / stage.folder, arguments.objective.intermediate_steps
    systems = [SYSTEMS[name].terms for name in (stage.system, arguments.objective.objective)]
    of_first, of_second = (inspect.signature(terms).parameters.keys() for terms in systems)
    defaults = {field.name: field.default for field in dataclasses.fields(ObjectiveArguments)}
    first_alone, second_alone = (
        {name: value for name, value in defaults.items() if name in names}
        for names in (of_first - of_second, of_second - of_first)
    )
    length = {} if steps is None else {"max_steps": steps}
    of_any = {} if arguments.training.metric_for_best_model is None else {"metric_for_best_model": "loss"}
    first = _run(
        arguments,
        {"output_dir": str(folder), "push_to_hub": False, **length, **of_any},
        {},
        second_alone | {"objective": stage.system, "intermediate_steps": None},
    )
    model = NO_SIZES | {"student": str(folder), "student_init": "auto"}
    model["student_embedding_dim"] = arguments.model.student_embedding_dim
    return first, _run(arguments, {}, model, first_alone | {"intermediate_steps": None})


def _chain(first: Arguments, second: Arguments, asked: Arguments) -> list[Arguments]:
    """Those of the two runs that are still to be done."""
    resume, folder = asked.training.resume_from_checkpoint, Path(str(first.training.output_dir))
    finished = (folder / METRICS).exists()
    if finished:
        _check_finished(folder, first, resume)
    if resume not in (None, "auto"):
        if folder.resolve() in Path(resume).resolve().parents:
            return [first, _run(second, {"resume_from_checkpoint": None})]
        if not finished:
            raise UsageError(
                f"{resume!r} is a checkpoint of the student, and {folder} holds no finished {_called(folder)}"
            )
    return [second] if resume is not None and finished else [first, second]


def _check_finished(folder: Path, arguments: Arguments, resume: str | None) -> None:
    """Whether the finished model in `folder` is the one that the command asks for, and its run is continued."""
    output = folder.parent
    if resume is None:
        starting_point(output, None)
        raise OccupiedError(
            f"{output} holds a finished {_called(folder)} and no finished student: add --resume_from_checkpoint auto "
            "to continue, or choose another --output_dir"
        )
    saved = json.loads((folder / METRICS).read_text(encoding="utf-8"))["arguments"]
    wanted = own_arguments(arguments)
    known = [name for name in wanted if name in saved]  # an earlier version had fewer flags
    check_equal(folder, {name: saved[name] for name in known}, {name: wanted[name] for name in known})


def _called(folder: Path) -> str:
    return folder.name if folder.name == ASSISTANT else f"{folder.name} student"


def _run(
    arguments: Arguments,
    training: dict[str, Any],
    model: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
) -> Arguments:
    """The same with these values."""
    changed = copy.copy(arguments.training)  # `replace` would run its __post_init__ again
    for name, value in training.items():
        setattr(changed, name, value)
    return dataclasses.replace(
        arguments,
        model=dataclasses.replace(arguments.model, **(model or {})),
        objective=dataclasses.replace(arguments.objective, **(objective or {})),
        training=changed,
        in_chain=True,
    )
