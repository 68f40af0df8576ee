"""The systems: each an objective by name, a list of terms for a teacher and a student, with the paper's section."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.capture import QKV
from minilm.models.heads import has_vocabulary_head
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.outputs import SoftLabels, check_temperature
from minilm.objectives.relations import Relations
from minilm.objectives.term import Objective, Term, Unit
from minilm.values import FLOAT32_MAX

MINILM, MINILM_V2 = ("qk", "vv"), ("qq", "kk", "vv")


def minilm(
    teacher_qkv: QKV,
    student_qkv: QKV,
    *,
    relations: Mapping[str, float] | None = None,
    relation_heads: int | None = None,
    teacher_layer: int = -1,
    causal: bool = False,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> list[Term]:
    """MiniLM (sections 3.1 and 3.2): the attention relation QK and the value relation VV, head by head.

    Args:
        teacher_qkv, student_qkv: (q, k, v) of any short input, each (B, H, N, D): they tell the heads and widths.
        relations: weights by relation instead of the paper's relations with weight 1.

    Raises:
        ValueError: an unknown relation; relation heads that do not divide the widths.
    """
    if relation_heads is not None:
        _check_relation_heads(relation_heads, teacher_qkv, student_qkv)
    criterion = MiniLMLoss(relations or MINILM, relation_heads, causal, temperature, implementation=implementation)
    return [Relations(criterion, {-1: teacher_layer})]


def minilm_v2(
    teacher_qkv: QKV,
    student_qkv: QKV,
    *,
    relations: Mapping[str, float] | None = None,
    relation_heads: int | None = None,
    **options: Any,
) -> list[Term]:
    """MiniLMv2 (section 3.1): QQ, KK and VV over relation heads, so that head counts need not match.

    Args: as in `minilm`, but for
        relation_heads: by default four to each of the teacher's heads, the paper's 48 for a base and 64 for a large
            teacher, and the teacher's own number where four times that does not divide both widths.
    """
    if relation_heads is None:
        relation_heads = _default_relation_heads(teacher_qkv, student_qkv)
    relations = relations or dict.fromkeys(MINILM_V2, 1.0)
    return minilm(teacher_qkv, student_qkv, relations=relations, relation_heads=relation_heads, **options)


SYSTEMS: dict[str, Callable[..., list[Term]]] = {"minilm": minilm, "minilm-v2": minilm_v2}


def with_soft_labels(
    terms: Iterable[Term], student: PreTrainedModel, weight: float, temperature: float = 1.0
) -> Objective:
    """The objective of these terms and, unless `weight` is 0, of the output loss (Hinton et al., section 2).

    Raises `ValueError` for a student without a head, and for a temperature that is not positive or out of range.
    """
    check_temperature(temperature)
    if not weight:
        return Objective(terms)
    unit: Unit = "tokens" if has_vocabulary_head(student) else "examples"
    return Objective([*terms, SoftLabels(unit, weight, temperature)])


def parse_relations(text: str) -> dict[str, float]:
    """Weights by relation from "qk,vv" (1 each) or "qk:1,vv:0.5".

    >>> parse_relations("qk,vv:0.5")
    {'qk': 1.0, 'vv': 0.5}
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        relation, colon, weight = item.strip().partition(":")
        if relation in weights:
            raise UsageError(f"relation {relation!r} stands twice in {text!r}")
        try:
            weights[relation] = float(weight) if colon else 1.0
        except ValueError:
            raise UsageError(f"the weight {weight!r} of relation {relation!r} in {text!r} is no number") from None
        if math.isfinite(weights[relation]) and weights[relation] > FLOAT32_MAX:
            raise UsageError(f"the weight {weight} of relation {relation!r} must be at most {FLOAT32_MAX:.7g}")
    return weights


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
