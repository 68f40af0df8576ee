"""The systems: each an objective by name, a list of terms for a teacher and a student, with the paper's section."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.heads import has_vocabulary_head
from minilm.models.layers import num_layers, resolve_layer_map
from minilm.models.probes import is_causal
from minilm.objectives.hidden import HiddenCosine
from minilm.objectives.hidden_mse import EMBEDDING, HiddenMSE
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.masked_lm import MaskedLM, check_masked_lm
from minilm.objectives.mobilebert import mobilebert, mobilebert_distillation, mobilebert_transfer
from minilm.objectives.outputs import SoftLabels, check_temperature
from minilm.objectives.relation_heads import check_relation_heads, default_relation_heads
from minilm.objectives.relations import Relations
from minilm.objectives.scores import ScoresMSE
from minilm.objectives.term import Objective, Term, Unit

MINILM, MINILM_V2 = ("qk", "vv"), ("qq", "kk", "vv")
# Flags of systems that are no options of their terms.
MASKING_FLAGS, TRANSFER_FLAGS = ("mlm_probability", "whole_word_masking"), ("lower_lr_factor",)


class Stage(NamedTuple):
    """What comes first; from its student the system's own run goes on."""

    system: str
    folder: str  # in the output folder
    by_layer: bool = False  # several runs, each of one layer of the student, and in a folder with its number


class System(NamedTuple):
    """What the command line must know of a system before there are models."""

    terms: Callable[..., list[Term]]  # (teacher, student, **options), the options under the names of their flags
    head: bool = False  # whether both models come with their heads
    masked: bool = False  # whether both see texts with masked tokens
    embedding_weight: float = 0.0  # of the sentence embedding beside the terms, where no flag says otherwise
    first: Stage | None = None
    transfers: bool = False  # whether embeddings and head start and stay as the teacher's; lower layers may be held


def minilm(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    relations: Mapping[str, float] | None = None,
    relation_heads: int | None = None,
    teacher_layer: int = -1,
    layer_map: Mapping[int, int] | None = None,
    relation_temperature: float = 1.0,
    implementation: str | None = None,
) -> list[Term]:
    """MiniLM (sections 3.1 and 3.2): the attention relation QK and the value relation VV, head by head.

    Args:
        relations: weights by relation instead of the paper's relations with weight 1.
        teacher_layer: whose relations the student's last layer learns.
        layer_map: the student's layers, each with the teacher's, instead (section 4.3 has layer to layer).

    Raises:
        ValueError: an unknown relation; relation heads that do not divide the widths; a layer that does not exist.
    """
    layers = _layers(teacher, student, layer_map, teacher_layer)
    if relation_heads is not None:
        check_relation_heads(teacher, student, layers, relation_heads)
    causal = is_causal(teacher)
    criterion = MiniLMLoss(
        relations or MINILM, relation_heads, causal, relation_temperature, implementation=implementation
    )
    return [Relations(criterion, layers)]


def minilm_v2(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    relations: Mapping[str, float] | None = None,
    relation_heads: int | None = None,
    teacher_layer: int = -1,
    layer_map: Mapping[int, int] | None = None,
    relation_temperature: float = 1.0,
    implementation: str | None = None,
) -> list[Term]:
    """MiniLMv2 (section 3.1): QQ, KK and VV over relation heads, so that head counts need not match.

    Args: as in `minilm`, but for
        relation_heads: by default four to each of the teacher's heads, the paper's 48 for a base and 64 for a large
            teacher, and the teacher's own number where four times that does not divide both widths.
    """
    if relation_heads is None:
        layers = _layers(teacher, student, layer_map, teacher_layer)
        relation_heads = default_relation_heads(teacher, student, layers)
    return minilm(
        teacher,
        student,
        relations=relations or dict.fromkeys(MINILM_V2, 1.0),
        relation_heads=relation_heads,
        teacher_layer=teacher_layer,
        layer_map=layer_map,
        relation_temperature=relation_temperature,
        implementation=implementation,
    )


def mlm_kd(teacher: PreTrainedModel, student: PreTrainedModel, *, output_temperature: float = 1.0) -> list[Term]:
    """MLM-KD (MiniLM, table 3): the teacher's soft labels for the masked tokens.

    Raises:
        ValueError: a teacher that is no masked LM.
    """
    check_masked_lm(teacher)
    return [SoftLabels("labels", temperature=output_temperature)]


def mlm(teacher: PreTrainedModel, student: PreTrainedModel) -> list[Term]:
    """The masked LM's loss alone (BERT, section 3.1), nothing of the teacher: what the others are to be better than.

    Raises:
        ValueError: a teacher that is no masked LM, whose kind of head the student has.
    """
    check_masked_lm(teacher)
    return [MaskedLM()]


def distilbert(teacher: PreTrainedModel, student: PreTrainedModel, *, output_temperature: float = 2.0) -> list[Term]:
    """DistilBERT (section 2): soft labels for all tokens, masked or not, the masked LM's loss, and a cosine.

    The weights and the temperature are those of its published training command.

    Raises:
        ValueError: a teacher that is no masked LM.
    """
    check_masked_lm(teacher)
    return [SoftLabels("tokens", 5.0, output_temperature), MaskedLM(2.0), HiddenCosine(1.0)]


def embedding(teacher: PreTrainedModel, student: PreTrainedModel) -> list[Term]:
    """The sentence embedding alone (Reimers and Gurevych, arXiv 2004.09813, section 2)."""
    return []


def tinybert(
    teacher: PreTrainedModel, student: PreTrainedModel, *, layer_map: Mapping[int, int] | None = None
) -> list[Term]:
    """TinyBERT's Transformer distillation (section 3.1, eq. 7 to 9): embeddings, hidden states, attention scores.

    It is the whole of the general stage (section 3.2), and of the first half of the task's. One projection serves all
    layers.

    Args:
        layer_map: the student's layers, each with the teacher's, instead of the uniform g(m) = m N / M (section 4.2).

    Raises:
        ValueError: a number of layers that does not divide the teacher's; a decoder, or a model of anything but texts.
    """
    for model in (teacher, student):
        if model.main_input_name != "input_ids" or is_causal(model):
            raise UsageError(
                f"--objective tinybert compares the scores of all pairs of a text's tokens, and {type(model).__name__} "
                + ("sees none ahead" if model.main_input_name == "input_ids" else f"takes {model.main_input_name}")
            )
    layers = _uniform_layers(teacher, student) if layer_map is None else resolve_layer_map(teacher, student, layer_map)
    projection = nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False)
    return [HiddenMSE({EMBEDDING: EMBEDDING, **layers}, projection), ScoresMSE(layers)]


def tinybert_task(teacher: PreTrainedModel, student: PreTrainedModel) -> list[Term]:
    """TinyBERT's prediction-layer distillation (section 3.1, eq. 10), with T = 1 (section 4.2).

    Raises:
        ValueError: a teacher that is no classifier.
    """
    if has_vocabulary_head(teacher):
        raise UsageError(
            f"--objective tinybert-task learns a classifier's answers, and the teacher is a {type(teacher).__name__}: "
            "fine-tune it on the task first"
        )
    return [SoftLabels("examples")]


SYSTEMS: dict[str, System] = {
    "minilm": System(minilm),
    "minilm-v2": System(minilm_v2),
    "mlm": System(mlm, head=True, masked=True),
    "mlm-kd": System(mlm_kd, head=True, masked=True),
    "distilbert": System(distilbert, head=True, masked=True),
    "tinybert": System(tinybert),
    "tinybert-task": System(tinybert_task, head=True, first=Stage("tinybert", "intermediate")),
    "mobilebert": System(mobilebert, head=True, masked=True),
    "mobilebert-joint": System(  # section 3.5: first the transfer, then the distillation
        mobilebert_distillation, head=True, masked=True, first=Stage("mobilebert-transfer", "transfer")
    ),
    "mobilebert-progressive": System(  # the same, but that each layer is transferred after those below
        mobilebert_distillation, head=True, masked=True, first=Stage("mobilebert-transfer", "layer", by_layer=True)
    ),
    "mobilebert-transfer": System(mobilebert_transfer, head=True, masked=True, transfers=True),
    "mobilebert-distillation": System(mobilebert_distillation, head=True, masked=True),
    "embedding": System(embedding, embedding_weight=1.0),
}


def flags_of(name: str) -> set[str]:
    """The flags that say something to a system, beside those that go with every one."""
    system = SYSTEMS[name]
    options = {*inspect.signature(system.terms).parameters} - {"teacher", "student"}
    return options | {*(MASKING_FLAGS if system.masked else ()), *(TRANSFER_FLAGS if system.transfers else ())}


def own_defaults(name: str) -> dict[str, Any]:
    """The defaults of a system's options by flag, but for options that are None: the flag's own counts for these."""
    options = inspect.signature(SYSTEMS[name].terms).parameters.values()
    return {option.name: option.default for option in options if option.default not in (option.empty, None)}


def with_soft_labels(
    terms: Iterable[Term], student: PreTrainedModel, weight: float, temperature: float = 1.0
) -> Objective:
    """The objective of these terms and, unless `weight` is 0, of the output loss (Hinton et al., section 2).

    Raises `ValueError` for a student without a head, for a temperature that is not positive or out of range, and for
    terms that have an output loss already.
    """
    check_temperature(temperature)
    terms = list(terms)
    if not weight:
        return Objective(terms)
    if own := next((term.parts["output"] for term in terms if "output" in term.parts), None):
        raise UsageError(
            f"output_weight is {weight:g}, and the objective has an output loss of weight {own:g} already: leave it out"
        )
    unit: Unit = "tokens" if has_vocabulary_head(student) else "examples"
    return Objective([*terms, SoftLabels(unit, weight, temperature)])


def _layers(
    teacher: PreTrainedModel, student: PreTrainedModel, layer_map: Mapping[int, int] | None, teacher_layer: int
) -> Mapping[int, int]:
    if layer_map is None:
        return {-1: teacher_layer}
    if teacher_layer != -1:
        raise UsageError(f"teacher_layer is {teacher_layer} and layer_map {dict(layer_map)}: give one of them")
    return resolve_layer_map(teacher, student, layer_map)


def _uniform_layers(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[int, int]:
    of_teacher, of_student = num_layers(teacher), num_layers(student)
    if of_teacher % of_student:
        raise UsageError(
            f"the teacher's {of_teacher} layers are not divisible by the student's {of_student}: give --layer_map, as "
            f"in 1:{max(1, of_teacher // of_student)},{of_student}:{of_teacher}"
        )
    return {layer: layer * of_teacher // of_student for layer in range(1, of_student + 1)}
