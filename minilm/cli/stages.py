"""Teacher, assistant, student: the runs that one command line asks for, one after the other (MiniLM, section 3.4)."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from minilm.cli.arguments import Arguments, own_arguments
from minilm.errors import UsageError
from minilm.training.runs import METRICS, OccupiedError, check_equal, starting_point

ASSISTANT = "assistant"  # the folder of the first run, in the output folder


def stages(arguments: Arguments) -> list[Arguments]:
    """The runs still to be done, in order: one, or the assistant's and then the student's.

    The assistant is a model of its own in OUTPUT_DIR/assistant. When the command is resumed, a finished one is not
    trained again.

    Raises:
        ValueError: a checkpoint of the student is named while there is no finished assistant; the finished one is of
            another teacher, size, objective or data.
        OccupiedError: there is a finished assistant, and nothing is to be resumed.
    """
    model, resume = arguments.model, arguments.training.resume_from_checkpoint
    if model.assistant_num_layers is None and model.assistant_hidden_size is None:
        return [arguments]
    folder = Path(str(arguments.training.output_dir)) / ASSISTANT
    none = {"assistant_num_layers": None, "assistant_hidden_size": None}
    first = _stage(
        arguments,
        {"output_dir": str(folder), "push_to_hub": False},
        **none,
        student_num_layers=model.assistant_num_layers,
        student_hidden_size=model.assistant_hidden_size,
        student_num_heads=None,
        student_intermediate_size=None,
        student_embedding_dim=None,
        student_vocabulary=None,
        student_init="auto" if model.student_init == "layers" else model.student_init,  # the student's are this one's
    )
    finished = (folder / METRICS).exists()
    if finished:
        _check_assistant(folder, first, resume)
    if resume not in (None, "auto"):
        if folder.resolve() in Path(resume).resolve().parents:
            second = _stage(arguments, {"resume_from_checkpoint": None}, **none, teacher=str(folder), teacher_layer=-1)
            return [first, second]
        if not finished:
            raise UsageError(f"{resume!r} is a checkpoint of the student, and {folder} holds no finished assistant")
    second = _stage(arguments, {}, **none, teacher=str(folder), teacher_layer=-1)
    return [second] if resume is not None and finished else [first, second]


def _check_assistant(folder: Path, arguments: Arguments, resume: str | None) -> None:
    """Whether the finished assistant in `folder` is the one that the command asks for, and its run is continued."""
    output = folder.parent
    if resume is None:
        starting_point(output, None)
        raise OccupiedError(
            f"{output} holds a finished {ASSISTANT} and no finished student: add --resume_from_checkpoint auto to "
            "continue, or choose another --output_dir"
        )
    saved = json.loads((folder / METRICS).read_text(encoding="utf-8"))["arguments"]
    wanted = own_arguments(arguments)
    check_equal(folder, {name: saved.get(name, "not set") for name in wanted}, wanted)


def _stage(arguments: Arguments, training: dict[str, Any], **model: Any) -> Arguments:
    changed = copy.copy(arguments.training)  # `replace` would run its __post_init__ again
    for name, value in training.items():
        setattr(changed, name, value)
    smaller = dataclasses.replace(arguments.model, **model)
    return dataclasses.replace(arguments, model=smaller, training=changed, in_assistant_chain=True)
