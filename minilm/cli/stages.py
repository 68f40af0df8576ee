"""The runs that one command line asks for, one after the other: teacher, assistant, student; or a system's stages."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from minilm.cli.arguments import Arguments, own_arguments
from minilm.cli.demo import teacher_folder
from minilm.cli.flags import ObjectiveArguments
from minilm.errors import UsageError
from minilm.models.configs import read_config
from minilm.models.layers import num_layers
from minilm.models.teachers import loading
from minilm.objectives.mobilebert import transferred_layers
from minilm.objectives.parsing import parse_layer_map, parse_layers
from minilm.objectives.systems import SYSTEMS, TRANSFER_FLAGS, Stage, flags_of
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
OF_EMBEDDING = ("embedding_weight", "embedding_loss", "pooling")


def stages(arguments: Arguments) -> list[Arguments]:
    """The runs still to be done, in order, of which each but the last leaves a model in a folder of its own.

    That is an assistant, which teaches the student then (MiniLM, section 3.4), or for a system of several stages the
    student itself, which goes on. When the command is resumed, finished runs are not done again.

    Raises:
        ValueError: a checkpoint of a run is named while the one before is not finished; a finished one is of another
            teacher, size, objective or data; an assistant for a system of several stages; layers of teacher and student
            that do not go together, where each has a run.
        OccupiedError: there is a finished first run, and nothing is to be resumed.
    """
    first = SYSTEMS[arguments.objective.objective].first
    model = arguments.model
    if model.assistant_num_layers is None and model.assistant_hidden_size is None:
        return [arguments] if first is None else _to_be_done(_stages_and_last(arguments, first), arguments)
    if first is not None:
        raise UsageError(
            f"--objective {arguments.objective.objective} has stages of its own: leave out --assistant_num_layers and "
            "--assistant_hidden_size"
        )
    return _to_be_done(_assistant_and_student(arguments), arguments)


def _assistant_and_student(arguments: Arguments) -> list[Arguments]:
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
    return [first, second]


def _stages_and_last(arguments: Arguments, stage: Stage) -> list[Arguments]:
    """What one of the two systems alone takes is said to it alone."""
    asked = arguments.objective
    if arguments.model.student_vocabulary is not None:
        raise UsageError(
            f"--student_vocabulary {arguments.model.student_vocabulary} cuts the teacher's vocabulary too, and "
            f"--objective {asked.objective} reads it again for its next run: leave it out"
        )
    of_stage, of_last = flags_of(stage.system), flags_of(asked.objective)
    if not stage.by_layer:  # it begins at the lowest layer
        of_stage -= {*TRANSFER_FLAGS}
    defaults = {field.name: field.default for field in dataclasses.fields(ObjectiveArguments)}
    stage_alone, last_alone = (
        {name: value for name, value in defaults.items() if name in names}
        for names in (of_stage - of_last, of_last - of_stage)
    )
    training: dict[str, Any] = {"push_to_hub": False}
    if asked.intermediate_steps is not None:
        training["max_steps"] = asked.intermediate_steps
    if arguments.training.metric_for_best_model is not None:
        training["metric_for_best_model"] = "loss"
    objective = last_alone | {"objective": stage.system, "intermediate_steps": None}
    model: dict[str, Any] = {}
    if stage.by_layer:  # the sentence embedding would train all layers at once
        objective |= {name: defaults[name] for name in OF_EMBEDDING}
        model["student_embedding_dim"] = None
    runs = []
    for name, of_run in _runs_of(stage, arguments).items():
        folder = str(Path(str(arguments.training.output_dir)) / name)
        runs.append(_run(arguments, training | {"output_dir": folder}, model, objective | of_run))
        model = NO_SIZES | {"student_embedding_dim": runs[0].model.student_embedding_dim}
        model |= {"student": folder, "student_init": "auto"}
    model["student_embedding_dim"] = arguments.model.student_embedding_dim
    return [*runs, _run(arguments, {}, model, stage_alone | {"intermediate_steps": None})]


def _runs_of(stage: Stage, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """The names of their folders, each with what the run is told of its objective alone."""
    if not stage.by_layer:
        return {stage.folder: {}}
    asked, model = arguments.objective, arguments.model
    teacher = _config("teacher", model.teacher or str(teacher_folder()))
    if model.student is not None:
        student = _config("student", model.student)
    else:
        student = copy.copy(teacher)
        of_init = parse_layers(model.student_init_layers) if model.student_init_layers else ()
        student.num_hidden_layers = model.student_num_layers or len(of_init) or num_layers(teacher)
    given = None if asked.layer_map is None else parse_layer_map(asked.layer_map)
    layers = transferred_layers(teacher, student, given)
    if len(layers) < num_layers(student):
        raise UsageError(
            f"--objective {asked.objective} trains one layer after another: --layer_map {asked.layer_map} names "
            f"{len(layers)} of the student's {num_layers(student)}"
        )
    held = {"lower_lr_factor": asked.lower_lr_factor or 0.0}
    return {f"{stage.folder}-{layer}": {"layer_map": f"{layer}:{layers[layer]}", **held} for layer in sorted(layers)}


def _config(who: str, name: str) -> Any:
    with loading(who, name):
        return read_config(name)


def _to_be_done(runs: list[Arguments], asked: Arguments) -> list[Arguments]:
    """Those that are not finished, or from the one on whose checkpoint is to be continued."""
    resume, last = asked.training.resume_from_checkpoint, len(runs) - 1
    folders = [Path(str(run.training.output_dir)) for run in runs]
    finished = [index for index in range(last) if (folders[index] / METRICS).exists()]
    for index in finished:
        _check_finished(folders[index], runs[index], resume)
    if resume in (None, "auto"):
        return runs[finished[-1] + 1 if finished else 0 :]
    above = Path(resume).resolve().parents
    at = next((index for index in range(last) if folders[index].resolve() in above), last)
    if at and at - 1 not in finished:
        whose = "student" if at == last else _called(folders[at])
        raise UsageError(
            f"{resume!r} is a checkpoint of the {whose}, and {folders[at - 1]} holds no finished "
            f"{_called(folders[at - 1])}"
        )
    return [runs[at], *(_run(run, {"resume_from_checkpoint": None}) for run in runs[at + 1 :])]


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
