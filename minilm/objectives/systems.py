"""The systems: each an objective by name, a list of terms for a teacher and a student, with the paper's section."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.capture import QKV
from minilm.models.heads import has_vocabulary_head
from minilm.models.layers import num_layers, resolve_layer_map
from minilm.models.observe import Needs
from minilm.models.probes import is_causal
from minilm.models.students import observe_probe
from minilm.objectives.hidden import HiddenCosine
from minilm.objectives.hidden_mse import HiddenMSE
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.masked_lm import MaskedLM
from minilm.objectives.outputs import SoftLabels, check_temperature
from minilm.objectives.relations import Relations
from minilm.objectives.term import Objective, Term, Unit

MINILM, MINILM_V2 = ("qk", "vv"), ("qq", "kk", "vv")


class System(NamedTuple):
    """What the command line must know of a system before there are models."""

    terms: Callable[..., list[Term]]  # (teacher, student, **options), the options under the names of their flags
    head: bool = False  # whether both models come with their heads
    masked: bool = False  # whether both see texts with masked tokens


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
        for pair in _probed(teacher, student, layers):
            _check_relation_heads(relation_heads, *pair)
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
        pairs = _probed(teacher, student, _layers(teacher, student, layer_map, teacher_layer))
        relation_heads = _default_relation_heads(*pairs[0])
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


def distilbert(teacher: PreTrainedModel, student: PreTrainedModel, *, output_temperature: float = 2.0) -> list[Term]:
    """DistilBERT (section 2): soft labels for all tokens, masked or not, the masked LM's loss, and a cosine.

    The weights and the temperature are those of its published training command.

    Raises:
        ValueError: a teacher that is no masked LM.
    """
    _check_masked_lm(teacher)
    return [SoftLabels("tokens", 5.0, output_temperature), MaskedLM(2.0), HiddenCosine(1.0)]


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
    distillation = mobilebert_distillation(teacher, student, output_temperature=output_temperature)
    return [
        *mobilebert_transfer(teacher, student, layer_map=layer_map, implementation=implementation),
        *distillation,
    ]


def mobilebert_transfer(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    layer_map: Mapping[int, int] | None = None,
    implementation: str | None = None,
) -> list[Term]:
    """MobileBERT's layer-wise knowledge transfer (section 3.4): layer-normed feature maps, and attention, head by head.

    Args:
        layer_map: the student's layers, each with the teacher's; by default each with its own.

    Raises:
        ValueError: other numbers of layers without `layer_map`; feature maps of other widths; other numbers of heads.
    """
    if layer_map is None:
        layers = num_layers(teacher)
        _check_equal("layers", teacher, student, layers, num_layers(student), "give --layer_map, or make them equal")
        layer_map = {layer: layer for layer in range(1, layers + 1)}
    layer_map = resolve_layer_map(teacher, student, layer_map)
    for what, name, remedy in (
        (
            "numbers in a feature map",
            "hidden_size",
            "give --student_hidden_size the teacher's, or train a teacher of the student's width, such as a MobileBert "
            "with a wider bottleneck (IB-BERT)",
        ),
        ("attention heads", "num_attention_heads", "give --student_num_heads the teacher's"),
    ):
        _check_equal(what, teacher, student, *(getattr(model.config, name) for model in (teacher, student)), remedy)
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
    "mlm-kd": System(mlm_kd, head=True, masked=True),
    "distilbert": System(distilbert, head=True, masked=True),
    "mobilebert": System(mobilebert, head=True, masked=True),
    "mobilebert-transfer": System(mobilebert_transfer, head=True, masked=True),
    "mobilebert-distillation": System(mobilebert_distillation, head=True, masked=True),
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
    objective = Objective(terms)
    if not weight:
        return objective
    if own := objective.parts.get("output"):
        raise UsageError(
            f"output_weight is {weight:g}, and the objective has an output loss of weight {own:g} already: leave it out"
        )
    unit: Unit = "tokens" if has_vocabulary_head(student) else "examples"
    return Objective([*objective, SoftLabels(unit, weight, temperature)])


def _check_equal(
    what: str, teacher: PreTrainedModel, student: PreTrainedModel, theirs: int, mine: int, remedy: str
) -> None:
    if theirs != mine:
        raise UsageError(
            f"the teacher, a {type(teacher).__name__}, has {theirs} {what}, the student, a {type(student).__name__}, "
            f"{mine}: {remedy}"
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


def _probed(teacher: PreTrainedModel, student: PreTrainedModel, layers: Mapping[int, int]) -> list[tuple[QKV, QKV]]:
    """q, k, v of each pair of layers for the shortest input."""
    given = observe_probe(teacher, Needs(tuple(layers.values()))).qkv
    made = observe_probe(student, Needs(tuple(layers))).qkv
    return [(given[of_teacher], made[layer]) for layer, of_teacher in layers.items()]


def _default_relation_heads(teacher_qkv: QKV, student_qkv: QKV) -> int:
    heads = teacher_qkv[0].shape[1]
    widths = sorted(_widths(teacher_qkv) | _widths(student_qkv))
    common = math.gcd(*widths)
    for candidate in (4 * heads, heads):
        if common % candidate == 0:
            return candidate
    raise UsageError(
        f"neither {4 * heads} nor {heads} relation heads divide the widths {widths} of q, k and v; "
        f"choose --relation_heads from {_divisors(common)}"
    )


def _check_relation_heads(relation_heads: int, teacher_qkv: QKV, student_qkv: QKV) -> None:
    teacher, student = _widths(teacher_qkv), _widths(student_qkv)
    common = math.gcd(*teacher, *student)
    if relation_heads < 1 or common % relation_heads:
        raise UsageError(
            f"{relation_heads} relation heads do not divide the teacher's width {_listed(teacher)} and the student's "
            f"{_listed(student)}; choose --relation_heads from {_divisors(common)}"
        )


def _widths(qkv: QKV) -> set[int]:
    return {x.shape[1] * x.shape[3] for x in qkv}


def _listed(widths: set[int]) -> str:
    return " and ".join(map(str, sorted(widths)))


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, min(number, 256) + 1) if number % divisor == 0)
