"""Relation heads (MiniLMv2, section 3.1): into how many queries, keys and values of two models are split."""

import math
from collections.abc import Mapping

from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.capture import QKV
from minilm.models.observe import Needs
from minilm.models.students import observe_probe


def default_relation_heads(teacher: PreTrainedModel, student: PreTrainedModel, layers: Mapping[int, int]) -> int:
    """Four to each of the teacher's heads; as many as these where four times that does not divide the widths.

    Args:
        layers: the student's, each with the teacher's, of which the first pair counts.

    Raises:
        ValueError: neither divides the widths.
    """
    teacher_qkv, student_qkv = _probed(teacher, student, layers)[0]
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


def check_relation_heads(
    teacher: PreTrainedModel, student: PreTrainedModel, layers: Mapping[int, int], relation_heads: int
) -> None:
    """Raises `ValueError` where that number does not divide the widths of q, k and v of both models."""
    for teacher_qkv, student_qkv in _probed(teacher, student, layers):
        theirs, mine = _widths(teacher_qkv), _widths(student_qkv)
        common = math.gcd(*theirs, *mine)
        if relation_heads < 1 or common % relation_heads:
            raise UsageError(
                f"{relation_heads} relation heads do not divide the teacher's width {_listed(theirs)} and the "
                f"student's {_listed(mine)}; choose --relation_heads from {_divisors(common)}"
            )


def _probed(teacher: PreTrainedModel, student: PreTrainedModel, layers: Mapping[int, int]) -> list[tuple[QKV, QKV]]:
    """q, k, v of each pair of layers for the shortest input."""
    given = observe_probe(teacher, Needs(tuple(layers.values()))).qkv
    made = observe_probe(student, Needs(tuple(layers))).qkv
    return [(given[of_teacher], made[layer]) for layer, of_teacher in layers.items()]


def _widths(qkv: QKV) -> set[int]:
    return {x.shape[1] * x.shape[3] for x in qkv}


def _listed(widths: set[int]) -> str:
    return " and ".join(map(str, sorted(widths)))


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, min(number, 256) + 1) if number % divisor == 0)
