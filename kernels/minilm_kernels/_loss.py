"""The public functions: one relation, and the weighted sum of relations that MiniLM trains with.

B batch, H heads of a model, R relation heads, N tokens, D head dimension of a model, S packed sequences.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minilm_kernels import _checks as checks
from minilm_kernels._allowed import Pattern, allowed_keys
from minilm_kernels._autograd import relation_losses
from minilm_kernels._grouping import grouping, known_grouping, layout
from minilm_kernels._heads import relation_pair
from minilm_kernels._reference import reference_losses

Triple = tuple[Tensor | None, Tensor | None, Tensor | None]
Scale = float | tuple[float | None, float | None] | None  # of both models, or the teacher's and the student's
Losses = tuple[Tensor, Tensor, Sequence[int]]
_PLACE = {"q": 0, "k": 1, "v": 2}


def fused_minilm_loss(
    teacher: Triple,
    student: Triple,
    relations: Sequence[str] | Mapping[str, float] = ("qk", "vv"),
    relation_heads: int | None = None,
    attention_mask: Tensor | None = None,
    causal: bool = False,
    prefix_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    scale: Scale = None,
    reduction: str = "sequence",
    implementation: str | None = None,
) -> Tensor:
    """MiniLM's loss: the weighted sum over relations of KL(teacher relation ‖ student relation), in nats.

    Args:
        teacher: (q, k, v), each (B, H_t, N, D_t) in float32, bfloat16 or float16; k and v may have fewer heads. They
            are constants. One that no relation uses may be None.
        student: (q, k, v), each (B, H_s, N, D_s); gradients flow here, in the dtype of each tensor.
        relations: pairs of the letters q, k, v: ("qk", "vv") is MiniLM (eq. 10), ("qq", "kk", "vv") MiniLMv2; or a
            dict of weights, {"qk": 1.0, "vv": 0.5}: numbers, not tensors. Weight 0 leaves a relation out.
        relation_heads: concatenate the heads of a token and split them again into this many (MiniLMv2, section 3.1).
            Needed where teacher and student have different numbers of heads.
        attention_mask: (B, N), nonzero where there is a token, in any pattern; not one that is added to scores. Padding
            counts neither as row nor as key, in any relation, and nothing behind it changes the loss or a gradient.
        causal: keys after the query are not allowed, in every relation.
        prefix_lengths: (B,) integers, with causal=True: all tokens see the first so many positions (UniLM).
        cu_seqlens: (S + 1,) integers, with B = 1: the packed sequences are [cu[s], cu[s+1]) and do not see each other;
            tokens from cu[-1] on are padding. Each is one sequence of the reduction, empty ones do not count.
        temperature: divides the scores of teacher and student besides.
        scale: what multiplies the scores instead of 1/√d (d of a relation head): one number, or the teacher's and the
            student's, each None for 1/√d. Unlike SDPA's it must be positive: 0 tells no token from another, and no
            attention prefers the tokens that are least alike.
        reduction: "sequence": per sequence the mean over heads and tokens, then the mean over the sequences that have
            tokens (MiniLM eq. 6 and 9); "token": every token of the batch weighs the same; "sum": no division.
        implementation: "triton" (CUDA), "chunked" (any device), "reference" (any device, N×N memory); None: triton on
            CUDA up to 1024 dimensions a head, else chunked. One that is named never falls back to another. "reference"
            alone has second and forward-mode derivatives; it multiplies 16-bit tensors in their own type, as eager code
            does, so that float16 scores end at 65504.

    Returns:
        A float32 scalar (float64 if the student is float64). With no token at all it is 0, with zero gradients.

    Raises:
        ValueError, TypeError: one sentence with the two values that do not fit, before any kernel starts.

    >>> q = torch.eye(2).reshape(1, 1, 2, 2)
    >>> fused_minilm_loss((q, q, q), (q, 3 * q, q))
    tensor(0.1794)
    """
    total, *_ = _losses_of_layers(
        [teacher],
        [student],
        checks.relation_weights(relations),
        relation_heads,
        Pattern(attention_mask, causal, prefix_lengths, cu_seqlens),
        temperature,
        scale,
        reduction,
        implementation,
    )
    return total


def minilm_losses(
    teacher: Sequence[Triple],
    student: Sequence[Triple],
    relation_weights: Mapping[str, float],
    relation_heads: int | None,
    attention_mask: Tensor | None,
    causal: bool,
    prefix_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: float,
    scale: Scale,
    reduction: str,
    implementation: str | None,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The sum of `fused_minilm_loss` over pairs of layers, all in one call.

    Layers of equal shapes share their launches.

    Args:
        teacher, student: (q, k, v) of as many layers, the pairs in order.

    Returns:
        The sum, and of each pair the loss of each relation by name, unweighted and detached.
    """
    pattern = Pattern(attention_mask, causal, prefix_lengths, cu_seqlens)
    total, values, order = _losses_of_layers(
        teacher, student, relation_weights, relation_heads, pattern, temperature, scale, reduction, implementation
    )
    by_place = dict(zip(order, values.unbind(0), strict=True))
    losses = iter([by_place[place] for place in range(len(order))])
    return total, [{name: next(losses) for name in relation_weights} for _ in teacher]


def _losses_of_layers(
    teacher: Sequence[Triple],
    student: Sequence[Triple],
    relation_weights: Mapping[str, float],
    relation_heads: int | None,
    pattern: Pattern,
    temperature: float,
    scale: Scale,
    reduction: str,
    implementation: str | None,
) -> Losses:
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    relations, sides = [], []
    for of_teacher, of_student in zip(teacher, student, strict=True):
        checks.check_triple("teacher", of_teacher)
        checks.check_triple("student", of_student)
        for name, weight in relation_weights.items():
            x, y = _PLACE[name[0]], _PLACE[name[1]]
            relations.append((name, weight))
            sides.append((of_teacher[x], of_teacher[y], of_student[x], of_student[y]))
    return _losses(relations, sides, relation_heads, pattern, temperature, scale, reduction, implementation)


def relation_kl(
    x_t: Tensor,
    y_t: Tensor,
    x_s: Tensor,
    y_s: Tensor,
    relation_heads: int | None = None,
    attention_mask: Tensor | None = None,
    causal: bool = False,
    prefix_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    scale: Scale = None,
    reduction: str = "sequence",
    implementation: str | None = None,
) -> Tensor:
    """KL(softmax(X_T Y_Tᵀ/√d_T) ‖ softmax(X_S Y_Sᵀ/√d_S)) of one relation, in nats; `scale` replaces the 1/√d.

    Args:
        x_t, y_t: the teacher's (B, H_t, N, D_t); `y_t is x_t` and `y_s is x_s` mark a self relation (QQ, KK, VV).
        x_s, y_s: the student's (B, H_s, N, D_s); gradients flow here.
        reduction: as in `fused_minilm_loss`, or "none" for the row losses (B, R, N), 0 at padding: which head and
            which token differ. They are differentiable under any row weights.

    The other arguments, the dtypes and the errors are those of `fused_minilm_loss`.

    >>> x = torch.eye(2).reshape(1, 1, 2, 2)
    >>> relation_kl(x, x, 3 * x, 3 * x, reduction="none")
    tensor([[[1.4690, 1.4690]]])
    """
    checks.check_choice("reduction", reduction, (*checks.REDUCTIONS, "none"))
    pattern = Pattern(attention_mask, causal, prefix_lengths, cu_seqlens)
    sides = [(x_t, y_t, x_s, y_s)]
    loss, *_ = _losses([("x-y", 1.0)], sides, relation_heads, pattern, temperature, scale, reduction, implementation)
    return loss[0] if reduction == "none" else loss


def _losses(
    relations: Sequence[tuple[str, float]],  # name and weight
    sides: Sequence[Any],  # `Sides` of each relation; what is no tensor is refused here
    relation_heads: int | None,
    pattern: Pattern,
    temperature: float,
    scale: Scale,
    reduction: str,
    implementation: str | None,
) -> Losses:
    """The weighted sum, and the losses of the relations, detached, with the place of each in `relations`.

    Under reduction "none" there is one relation, and its rows (1, B, R, N) stand for the weighted sum.
    """
    temperature, scales = checks.as_temperature(temperature), checks.as_scales(scale)
    relation_heads = checks.as_relation_heads(relation_heads)
    checks.check_causal(pattern.causal)
    if implementation is not None:
        checks.check_choice("implementation", implementation, checks.IMPLEMENTATIONS)
    known, described = not torch.compiler.is_compiling(), []
    for (name, weight), tensors in zip(relations, sides, strict=True):
        x_t, y_t, x_s, y_s = tensors
        is_self = y_t is x_t and y_s is x_s
        for x in (x_t, x_s) if is_self else tensors:
            if type(x) is not Tensor:
                checks.check_tensors(name, tensors)
                known = False  # of fake tensors the shapes may be symbols, which have no hash
            elif x.layout is not torch.strided or x.is_nested:
                checks.check_tensors(name, tensors)
        x_t_layout, x_s_layout = layout(x_t), layout(x_s)
        layouts = x_t_layout, x_t_layout if is_self else layout(y_t), x_s_layout, x_s_layout if is_self else layout(y_s)
        described.append((name, weight, is_self, layouts))
    has_row_weights = pattern.attention_mask is not None or pattern.cu_seqlens is not None
    options = relation_heads, has_row_weights, pattern.causal, temperature, scales, reduction, implementation
    call = tuple(described), *options
    groups, order, chosen, splits_heads, wide = (known_grouping if known else grouping)(call)

    (batch, _, length, _), _, _, device = described[0][3][0]
    checks.check_pattern(pattern, batch, length, device)
    masks = allowed_keys(pattern, reduction, batch, length, device, wide)
    if splits_heads:
        sides = [
            (*relation_pair(x_t, y_t, relation_heads), *relation_pair(x_s, y_s, relation_heads))
            for x_t, y_t, x_s, y_s in sides
        ]
    grouped = [group.relations(sides, masks) for group in groups]
    if chosen == "reference":
        return *reference_losses(grouped, pattern), order
    return *relation_losses(grouped, chosen), order
