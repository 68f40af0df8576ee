"""The objectives by name, as the loss module that trains them.

`minilm` (MiniLM, section 3.1 and 3.2): the attention relation QK and the value relation VV, head by head.
`minilm-v2` (MiniLMv2, section 3.1): QQ, KK and VV over relation heads, so that head counts need not match.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from minilm.objectives.loss import MiniLMLoss
from minilm.values import FLOAT32_MAX

QKV = tuple[Tensor, Tensor, Tensor]
RELATIONS = {"minilm": ("qk", "vv"), "minilm-v2": ("qq", "kk", "vv")}


def build_objective(
    name: str,
    teacher_qkv: QKV,
    student_qkv: QKV,
    *,
    relations: Mapping[str, float] | None = None,
    relation_heads: int | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    implementation: str | None = None,
) -> MiniLMLoss:
    """The loss of an objective for a teacher and a student, tried once on their tensors.

    Args:
        name: "minilm" or "minilm-v2".
        teacher_qkv, student_qkv: (q, k, v) of any short input, each (B, H, N, D): they tell the heads and widths.
        relations: weights by relation instead of the objective's own relations with weight 1.
        relation_heads: of `minilm-v2` by default four to each of the teacher's heads, the paper's 48 for a base and 64
            for a large teacher, and the teacher's own number where four times that does not divide both widths.

    Raises:
        ValueError: heads or widths that do not fit, an unknown relation, an implementation that cannot run there.
    """
    if relation_heads is not None:
        _check_relation_heads(relation_heads, teacher_qkv, student_qkv)
    elif name == "minilm-v2":
        relation_heads = _default_relation_heads(teacher_qkv, student_qkv)
    criterion = MiniLMLoss(
        relations or RELATIONS[name], relation_heads, causal, temperature, implementation=implementation
    )
    criterion(teacher_qkv, student_qkv)
    return criterion


def parse_relations(text: str) -> dict[str, float]:
    """Weights by relation from "qk,vv" (1 each) or "qk:1,vv:0.5".

    >>> parse_relations("qk,vv:0.5")
    {'qk': 1.0, 'vv': 0.5}
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        relation, colon, weight = item.strip().partition(":")
        if relation in weights:
            raise ValueError(f"relation {relation!r} stands twice in {text!r}")
        try:
            weights[relation] = float(weight) if colon else 1.0
        except ValueError:
            raise ValueError(f"the weight {weight!r} of relation {relation!r} in {text!r} is no number") from None
        if math.isfinite(weights[relation]) and weights[relation] > FLOAT32_MAX:
            raise ValueError(f"the weight {weight} of relation {relation!r} must be at most {FLOAT32_MAX:.7g}")
    return weights


def _default_relation_heads(teacher_qkv: QKV, student_qkv: QKV) -> int:
    heads = teacher_qkv[0].shape[1]
    widths = sorted(_widths(teacher_qkv) | _widths(student_qkv))
    common = math.gcd(*widths)
    for candidate in (4 * heads, heads):
        if common % candidate == 0:
            return candidate
    raise ValueError(
        f"neither {4 * heads} nor {heads} relation heads divide the widths {widths} of q, k and v; "
        f"choose --relation_heads from {_divisors(common)}"
    )


def _check_relation_heads(relation_heads: int, teacher_qkv: QKV, student_qkv: QKV) -> None:
    teacher, student = _widths(teacher_qkv), _widths(student_qkv)
    common = math.gcd(*teacher, *student)
    if relation_heads < 1 or common % relation_heads:
        raise ValueError(
            f"{relation_heads} relation heads do not divide the teacher's width {_listed(teacher)} and the student's "
            f"{_listed(student)}; choose --relation_heads from {_divisors(common)}"
        )


def _widths(qkv: QKV) -> set[int]:
    return {x.shape[1] * x.shape[3] for x in qkv}


def _listed(widths: set[int]) -> str:
    return " and ".join(map(str, sorted(widths)))


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, min(number, 256) + 1) if number % divisor == 0)
