"""The student as it starts, and the objective that it learns, as the arguments say."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.cli.arguments import Arguments, own_arguments
from minilm.cli.demo import teacher_folder
from minilm.cli.flags import ModelArguments, ObjectiveArguments
from minilm.errors import UsageError, tried
from minilm.models.continued import load_student, with_same_head
from minilm.models.embeddings import SentenceFiles, sentence_files
from minilm.models.heads import check_output, has_vocabulary_head
from minilm.models.observe import resolve_needs
from minilm.models.probes import check_no_films, probe_inputs
from minilm.models.students import build_student
from minilm.models.teachers import read_teacher
from minilm.models.weights import copy_ends, learning_rate_factors
from minilm.objectives.embedding import sentence_embedding
from minilm.objectives.masking import Masking
from minilm.objectives.parsing import parse_layer_map, parse_layers, parse_relations
from minilm.objectives.systems import (
    MASKING_FLAGS,
    SYSTEMS,
    TRANSFER_FLAGS,
    flags_of,
    own_defaults,
    with_soft_labels,
)
from minilm.objectives.term import Objective, Term

PARSED = {"relations": parse_relations, "layer_map": parse_layer_map}
# Flags of terms that go with every system, unless it has such a term of its own.
_OF_ALL = ("objective", "output_weight", "output_temperature", "embedding_weight", "embedding_loss", "pooling")


def needs_head(arguments: Arguments) -> bool:
    """Whether both models come with their heads."""
    return SYSTEMS[arguments.objective.objective].head or arguments.objective.output_weight > 0


def masking(arguments: Arguments, tokenizer: Any) -> Masking | None:
    """For a system whose models read masked text; raises `ValueError` as `Masking`."""
    if not SYSTEMS[arguments.objective.objective].masked:
        return None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(f"--objective {arguments.objective.objective} masks tokens, and the teacher takes images")
    objective, training = arguments.objective, arguments.training
    return Masking(
        tokenizer,
        probability=objective.mlm_probability,
        whole_words=objective.whole_word_masking,
        seed=training.seed if training.data_seed is None else training.data_seed,
    )


def student_and_objective(
    arguments: Arguments,
    teacher: PreTrainedModel,
    sentences: SentenceFiles | None = None,
    student: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, Objective]:
    """The student on its device, and the objective, tried once on both models.

    Args:
        sentences: the teacher's sentence-transformers files.
        student: one of its sizes, where the one asked for is not there yet.

    Raises `ValueError` for a student that cannot be built, and for an objective that the models cannot have.
    """
    model, objective, training = arguments.model, arguments.objective, arguments.training
    check_no_films(teacher)
    options = system_options(objective, model)
    with_head = needs_head(arguments)
    if student is None:
        student = _student(arguments, teacher)
    if with_head:
        for whole_model in (teacher, student):
            check_output(whole_model, probe_inputs(whole_model))
    teacher.to(training.device)  # type: ignore[arg-type]
    student.to(training.device)  # type: ignore[arg-type]
    with torch.no_grad():  # a graph would keep the parameters as they are now
        terms = SYSTEMS[objective.objective].terms(teacher, student, **options)
        terms += _embedding(arguments, teacher, student, sentences)
        whole = with_soft_labels(terms, student, objective.output_weight, objective.output_temperature)
        whole.to(training.device).probe(teacher, student)
    return student, whole


def _embedding(
    arguments: Arguments, teacher: PreTrainedModel, student: PreTrainedModel, sentences: SentenceFiles | None
) -> list[Term]:
    """The term of the sentence embedding where it has a weight; raises `ValueError` for its flags where it has none."""
    objective = arguments.objective
    weight = objective.embedding_weight
    if weight is None:
        weight = SYSTEMS[objective.objective].embedding_weight
    if not weight:
        own = own_arguments(arguments)
        for name, default in (("student_embedding_dim", None), ("embedding_loss", "cosine"), ("pooling", "auto")):
            if own[name] != default:
                raise UsageError(
                    f"--{name} {own[name]} is given and --embedding_weight is {weight:g}: give it a weight"
                )
        return []
    return [
        sentence_embedding(
            teacher,
            student,
            sentences,
            pooling=None if objective.pooling == "auto" else objective.pooling,
            student_embedding_dim=arguments.model.student_embedding_dim,
            loss=objective.embedding_loss,
            weight=weight,
            own_files=sentence_files(arguments.model.student) if arguments.model.student else None,
        )
    ]


def _student(arguments: Arguments, teacher: PreTrainedModel) -> PreTrainedModel:
    model, seed, with_head = arguments.model, arguments.training.seed, needs_head(arguments)
    if model.student is not None:
        return load_student(model.student, teacher, with_head=with_head, seed=seed)
    student = build_student(
        teacher,
        num_layers=model.student_num_layers,
        hidden_size=model.student_hidden_size,
        num_heads=model.student_num_heads,
        intermediate_size=model.student_intermediate_size,
        init=model.student_init,
        teacher_layers=None if model.student_init_layers is None else parse_layers(model.student_init_layers),
        seed=seed,
        with_head=with_head,
    )
    if SYSTEMS[arguments.objective.objective].transfers and model.student_init == "auto":
        copy_ends(teacher, student)
    return student


def rates(
    arguments: Arguments, teacher: PreTrainedModel, student: PreTrainedModel, objective: Objective
) -> dict[str, float]:
    """Factors of the learning rate by the names of the student's parameters, where a system has them."""
    if not SYSTEMS[arguments.objective.objective].transfers:
        return {}
    lowest, factor = min(resolve_needs(student, objective.student).hidden), arguments.objective.lower_lr_factor
    return learning_rate_factors(teacher, student, lowest, 1.0 if factor is None else factor)


def try_later(runs: Sequence[Arguments], before: Arguments, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Builds what the runs after `before` learn: its student teaches there, or goes on where the teacher is the same.

    Raises as `student_and_objective` and `check_whole_rows`.
    """
    its_student: PreTrainedModel | None = student
    for run in runs:
        if run.model.teacher != before.model.teacher:
            teacher, its_student = student, None
        elif needs_head(run) and not needs_head(before):
            teacher = read_teacher(run.model.teacher or str(teacher_folder()), head=True).model
            its_student = with_same_head(student, teacher)
        with tried("cannot build the student"):
            _, objective = student_and_objective(run, teacher, student=its_student)
        if run.data.packing:
            check_whole_rows(teacher, objective)


def check_whole_rows(teacher: PreTrainedModel, objective: Objective) -> None:
    """Raises `ValueError` for packed rows of a model that classifies them whole."""
    if objective.student.output and not has_vocabulary_head(teacher):
        raise UsageError(f"--packing puts texts together that {type(teacher).__name__} must see one by one")


def system_options(objective: ObjectiveArguments, model: ModelArguments) -> dict[str, Any]:
    """What the flags that were set say to the system, by their names.

    Raises `ValueError` for a flag that the system has no use for.
    """
    takes = flags_of(objective.objective)
    fields = (field for field in dataclasses.fields(objective) if field.name in takes or field.name not in _OF_ALL)
    flags = {field.name: field.default for field in fields}
    given = {name: getattr(objective, name) for name in flags} | {"teacher_layer": model.teacher_layer}
    flags |= {"teacher_layer": -1} | own_defaults(objective.objective)
    if objective.output_temperature != 1 and not objective.output_weight and "output_temperature" not in takes:
        raise UsageError(
            f"--output_temperature {objective.output_temperature:g} is given, and --objective {objective.objective} "
            "has no output loss without --output_weight: give it a weight, or leave it out"
        )
    options = {}
    for name, value in given.items():
        if value == flags[name]:
            continue
        if name not in takes:
            raise UsageError(f"--{name} {value} means nothing to --objective {objective.objective}: leave it out")
        if name not in (*MASKING_FLAGS, *TRANSFER_FLAGS):
            options[name] = PARSED[name](value) if name in PARSED else value
    return options
