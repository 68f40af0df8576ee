"""Students that go on from a model: from weights in a folder, instead of sizes and the teacher's layers."""

from typing import Any, cast

import torch
from transformers import AutoModel, PreTrainedModel

from minilm.errors import UsageError
from minilm.models.configs import read_config
from minilm.models.heads import has_vocabulary_head
from minilm.models.probes import base_of, embedding_rows
from minilm.models.students import seeded
from minilm.models.teachers import auto_class, check_complete, check_weights, is_of_head, loading, quiet


def load_student(
    name: str, teacher: PreTrainedModel, *, with_head: bool = False, seed: int | None = None
) -> PreTrainedModel:
    """The float32 model `name`, of whatever class, on the CPU: without a head, or with the kind that the teacher has.

    A head that its weights lack starts as the class makes it, the same every time with `seed`. So does one for another
    number of labels: a classifier's labels are the teacher's.

    Raises:
        ValueError: nothing that loads there; weights that are not the model's; another vocabulary than the teacher's.
    """
    kind = auto_class(teacher) if with_head else AutoModel
    with loading("student", name), quiet():
        config = read_config(name, **_labels(teacher, with_head))
        with seeded(seed):
            model, info = kind.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )
    with loading("student", name):
        info["mismatched_keys"] = [
            found for found in info["mismatched_keys"] if not (with_head and _of_head(found[0], model))
        ]
        check_complete("student", name, (key for key in info["missing_keys"] if not _of_head(key, model)))
        check_weights("student", name, model, info)
        _check_inputs(name, model, teacher)
    return cast(PreTrainedModel, model)


def with_same_head(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """An untrained model of the student's sizes with the kind of head that the teacher has."""
    config = type(student.config).from_dict(student.config.to_dict() | _labels(teacher, True))
    return cast(PreTrainedModel, auto_class(teacher).from_config(config))


def _labels(teacher: PreTrainedModel, with_head: bool) -> dict[str, Any]:
    """What the config of a classifier says of its labels."""
    if not with_head or has_vocabulary_head(teacher):
        return {}
    config: Any = teacher.config
    return {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}


def _of_head(key: str, model: PreTrainedModel) -> bool:
    """Of a base model the pooler, which not every checkpoint has."""
    return key.startswith("pooler.") if base_of(model) is model else is_of_head(key, model)


def _check_inputs(name: str, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if model.main_input_name != teacher.main_input_name:
        raise UsageError(f"the student {name!r} takes {model.main_input_name}, the teacher {teacher.main_input_name}")
    if model.main_input_name != "input_ids":
        return
    mine, theirs = (embedding_rows(x) for x in (model, teacher))
    if mine != theirs:
        raise UsageError(
            f"the student {name!r} has a vocabulary of {mine}, the teacher one of {theirs}: both read the same tokens"
        )
