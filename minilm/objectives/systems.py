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
from minilm.objectives.masked_lm import MaskedLM
from minilm.objectives.outputs import SoftLabels, check_temperature
from minilm.objectives.relation_heads import check_relation_heads, default_relation_heads
from minilm.objectives.relations import Relations
from minilm.objectives.scores import ScoresMSE
from minilm.objectives.term import Objective, Term, Unit

MINILM, MINILM_V2 = ("qk", "vv"), ("qq", "kk", "vv")


class Stage(NamedTuple):
    """A run that comes first; from its student the system's own run goes on."""

    system: str
    folder: str  # in the output folder


class System(NamedTuple):
    """What the command line must know of a system before there are models."""

    terms: Callable[..., list[Term]]  # (teacher, student, **options), the options under the names of their flags
    head: bool = False  # whether both models come with their heads
    masked: bool = False  # whether both see texts with masked tokens
    embedding_weight: float = 0.0  # of the sentence embedding beside the terms, where no flag says otherwise
    first: Stage | None = None


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
    _check_masked_lm(teacher)
    return [SoftLabels("labels", temperature=output_temperature)]


def mlm(teacher: PreTrainedModel, student: PreTrainedModel) -> list[Term]:
    """The masked LM's loss alone (BERT, section 3.1), nothing of the teacher: what the others are to be better than.

    Raises:
        ValueError: a teacher that is no masked LM, whose kind of head the student has.
    """
    _check_masked_lm(teacher)
    return [MaskedLM()]


def distilbert(teacher: PreTrainedModel, student: PreTrainedModel, *, output_temperature: float = 2.0) -> list[Term]:
    """DistilBERT (section 2): soft labels for all tokens, masked or not, the masked LM's loss, and a cosine.

    The weights and the temperature are those of its published training command.

    Raises:
        ValueError: a teacher that is no masked LM.
    """
    _check_masked_lm(teacher)
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


def mobilebert(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    layer_map: Mapping[int, int] | None = None,
    output_temperature: float = 1.0,
    implementation: str | None = None,
) -> list[Term]:
    """MobileBERT, knowledge transfer beside pre-training distillation in one loss (section 3.5, "auxiliary").

    Args: as in `mobilebert_transfer` and `mobilebert_distillation`; raises as these.
    """
    return [
        *mobilebert_transfer(teacher, student, layer_map=layer_map, implementation=implementation),
        *mobilebert_distillation(teacher, student, output_temperature=output_temperature),
    ]


def mobilebert_transfer(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    layer_map: Mapping[int, int] | None = None,
    implementation: str | None = None,
) -> list[Term]:
    """MobileBERT's layer-wise knowledge transfer (section 3.4): layer-normed feature maps, and attention, head by head.

    Means and variances of the feature maps, which the paper compares besides, are left out: it names no weights.

    Args:
        layer_map: the student's layers, each with the teacher's; by default each with its own.

    Raises:
        ValueError: other numbers of layers without `layer_map`; feature maps of other widths; other numbers of heads.
    """
    pair = teacher, student
    if layer_map is None:
        _check_equal("layers", *pair, num_layers, "give --layer_map, or make them equal")
        layer_map = {layer: layer for layer in range(1, num_layers(student) + 1)}
    layer_map = resolve_layer_map(*pair, layer_map)
    _check_equal(
        "numbers in a feature map",
        *pair,
        lambda model: model.config.hidden_size,
        "give --student_hidden_size the teacher's, or train a teacher of the student's width, such as a MobileBert "
        "with a wider bottleneck (IB-BERT)",
    )
    _check_equal(
        "attention heads",
        *pair,
        lambda model: model.config.num_attention_heads,
        "give --student_num_heads the teacher's",
    )
    attention = MiniLMLoss({"qk": 1.0}, causal=is_causal(teacher), implementation=implementation)
    return [HiddenMSE(layer_map, normalised=True), Relations(attention, layer_map)]


def mobilebert_distillation(
    teacher: PreTrainedModel, student: PreTrainedModel, *, output_temperature: float = 1.0
) -> list[Term]:
    """MobileBERT's pre-training distillation (section 3.4): half the teacher's soft labels, half the words themselves.

    Next sentences are left out: the data are texts, not pairs of them.

    Raises:
        ValueError: a teacher that is no masked LM.
    """
    _check_masked_lm(teacher)
    return [SoftLabels("labels", 0.5, output_temperature), MaskedLM(0.5)]


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
    "mobilebert-transfer": System(mobilebert_transfer, head=True, masked=True),
    "mobilebert-distillation": System(mobilebert_distillation, head=True, masked=True),
    "embedding": System(embedding, embedding_weight=1.0),
}


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


def _check_equal(
    what: str, teacher: PreTrainedModel, student: PreTrainedModel, count: Callable[[Any], int], remedy: str
) -> None:
    if count(teacher) != count(student):
        raise UsageError(
            f"the teacher, a {type(teacher).__name__}, has {count(teacher)} {what}, the student, a "
            f"{type(student).__name__}, {count(student)}: {remedy}"
        )


def _check_masked_lm(teacher: PreTrainedModel) -> None:
    if not has_vocabulary_head(teacher):
        kind = "classifies"
    elif is_causal(teacher):
        kind = "predicts the next token"
    else:
        return
    raise UsageError(f"the teacher is a {type(teacher).__name__}, which {kind}: masked tokens need a masked LM")


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
