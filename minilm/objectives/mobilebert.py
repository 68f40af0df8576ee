"""MobileBERT's terms: layer-wise knowledge transfer, pre-training distillation, and both in one loss."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.layers import num_layers, resolve_layer_map
from minilm.models.probes import is_causal
from minilm.objectives.hidden_mse import HiddenMSE
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.masked_lm import MaskedLM, check_masked_lm
from minilm.objectives.outputs import SoftLabels
from minilm.objectives.relations import Relations
from minilm.objectives.term import Term


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
    layer_map = transferred_layers(*pair, layer_map)
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


def transferred_layers(teacher: Any, student: Any, layer_map: Mapping[int, int] | None) -> dict[int, int]:
    """The student's layers, each with the teacher's, by their numbers from 1; by default each with its own.

    Args:
        teacher, student: models, or their configs.

    Raises `ValueError` for other numbers of layers without `layer_map`, and as `resolve_layer_map`.
    """
    if layer_map is None:
        _check_equal("layers", teacher, student, num_layers, "give --layer_map, or make them equal")
        layer_map = {layer: layer for layer in range(1, num_layers(student) + 1)}
    return resolve_layer_map(teacher, student, layer_map)


def mobilebert_distillation(
    teacher: PreTrainedModel, student: PreTrainedModel, *, output_temperature: float = 1.0
) -> list[Term]:
    """MobileBERT's pre-training distillation (section 3.4): half the teacher's soft labels, half the words themselves.

    Next sentences are left out: the data are texts, not pairs of them.

    Raises:
        ValueError: a teacher that is no masked LM.
    """
    check_masked_lm(teacher)
    return [SoftLabels("labels", 0.5, output_temperature), MaskedLM(0.5)]


def _check_equal(what: str, teacher: Any, student: Any, count: Callable[[Any], int], remedy: str) -> None:
    if count(teacher) != count(student):
        raise UsageError(
            f"the teacher, a {type(teacher).__name__}, has {count(teacher)} {what}, the student, a "
            f"{type(student).__name__}, {count(student)}: {remedy}"
        )
