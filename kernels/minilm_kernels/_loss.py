"""The public functions: one relation, and the weighted sum of relations that MiniLM trains with.

B batch, H heads of a model, R relation heads, N tokens, D head dimension of a model, S packed sequences.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minilm_kernels import _checks as checks
from minilm_kernels._allowed import Pattern, allowed_keys
from minilm_kernels._autograd import relation_losses
from minilm_kernels._heads import relation_pair
from minilm_kernels._reference import reference_losses
from minilm_kernels._relations import Relations

Triple = tuple[Tensor | None, Tensor | None, Tensor | None]
Sides = tuple[Tensor, Tensor, Tensor, Tensor]  # x and y of the teacher, x and y of the student
Losses = tuple[Tensor, list[str], list[Tensor]]


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
    reduction: str = "sequence",
    implementation: str | None = None,
) -> Tensor:
    """MiniLM's loss: the weighted sum over relations of KL(teacher relation ‖ student relation), in nats.

    Args:
        teacher: (q, k, v), each (B, H_t, N, D_t) in float32, bfloat16 or float16; k and v may have fewer heads. They
            are constants. One that no relation uses may be None.
        student: (q, k, v), each (B, H_s, N, D_s); gradients flow here, in the dtype of each tensor.
        relations: pairs of the letters q, k, v: ("qk", "vv") is MiniLM (eq. 10), ("qq", "kk", "vv") MiniLMv2; or a
            dict of weights, {"qk": 1.0, "vv": 0.5}. Weight 0 leaves a relation out.
        relation_heads: concatenate the heads of a token and split them again into this many (MiniLMv2, section 3.1).
            Needed where teacher and student have different numbers of heads.
        attention_mask: (B, N), nonzero where there is a token, in any pattern. Padding counts neither as row nor as
            key, in any relation, and nothing behind it changes the loss or a gradient.
        causal: keys after the query are not allowed, in every relation.
        prefix_lengths: (B,) integers, with causal=True: all tokens see the first so many positions (UniLM).
        cu_seqlens: (S + 1,) integers, with B = 1: the packed sequences are [cu[s], cu[s+1]) and do not see each other;
            tokens from cu[-1] on are padding. Each is one sequence of the reduction, empty ones do not count.
        temperature: divides the scores of teacher and student.
        reduction: "sequence": per sequence the mean over heads and tokens, then the mean over the sequences that have
            tokens (MiniLM eq. 6 and 9); "token": every token of the batch weighs the same; "sum": no division.
        implementation: "triton" (CUDA), "chunked" (any device), "reference" (any device, N×N memory); None: triton on
            CUDA up to 256 dimensions a head, else chunked. One that is named never falls back to another.

    Returns:
        A float32 scalar (float64 if the student is float64). With no token at all it is 0, with zero gradients.

    Raises:
        ValueError, TypeError: one sentence with the two values that do not fit, before any kernel starts.

    >>> q = torch.eye(2).reshape(1, 1, 2, 2)
    >>> fused_minilm_loss((q, q, q), (q, 3 * q, q))
    tensor(0.1794)
    """
    total, _, _ = _checked_losses(
        teacher,
        student,
        checks.relation_weights(relations),
        relation_heads,
        Pattern(attention_mask, causal, prefix_lengths, cu_seqlens),
        temperature,
        reduction,
        implementation,
    )
    return total


def minilm_losses(
    teacher: Triple,
    student: Triple,
    relation_weights: Mapping[str, float],
    relation_heads: int | None,
    attention_mask: Tensor | None,
    causal: bool,
    prefix_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: float,
    reduction: str,
    implementation: str | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`fused_minilm_loss`, and the loss of each relation by name, unweighted and detached."""
    pattern = Pattern(attention_mask, causal, prefix_lengths, cu_seqlens)
    total, names, values = _checked_losses(
        teacher, student, relation_weights, relation_heads, pattern, temperature, reduction, implementation
    )
    parts = dict(zip(names, (part for value in values for part in value.unbind(0)), strict=True))
    return total, {name: parts[name] for name in relation_weights}


def _checked_losses(
    teacher: Triple,
    student: Triple,
    relation_weights: Mapping[str, float],
    relation_heads: int | None,
    pattern: Pattern,
    temperature: float,
    reduction: str,
    implementation: str | None,
) -> Losses:
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    teacher_tensors = checks.check_triple("teacher", teacher, relation_weights)
    student_tensors = checks.check_triple("student", student, relation_weights)
    checks.check_same_place(teacher_tensors, student_tensors)
    sides = {
        name: (teacher_tensors[name[0]], teacher_tensors[name[1]], student_tensors[name[0]], student_tensors[name[1]])
        for name in relation_weights
    }
    return _losses(sides, relation_weights, relation_heads, pattern, temperature, reduction, implementation)


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
    reduction: str = "sequence",
    implementation: str | None = None,
) -> Tensor:
    """KL(softmax(X_T Y_Tᵀ/√d_T) ‖ softmax(X_S Y_Sᵀ/√d_S)) of one relation, in nats.

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
    tensors = {"x_t": x_t, "y_t": y_t}, {"x_s": x_s, "y_s": y_s}
    for name, x in (tensors[0] | tensors[1]).items():
        checks.check_tensor(name, x)
    checks.check_same_place(*tensors)
    pattern = Pattern(attention_mask, causal, prefix_lengths, cu_seqlens)
    sides = {"x-y": (x_t, y_t, x_s, y_s)}
    loss, _, _ = _losses(sides, {"x-y": 1.0}, relation_heads, pattern, temperature, reduction, implementation)
    return loss[0] if reduction == "none" else loss


def _losses(
    sides: Mapping[str, Sides],
    weights: Mapping[str, float],
    relation_heads: int | None,
    pattern: Pattern,
    temperature: float,
    reduction: str,
    implementation: str | None,
) -> Losses:
    """The weighted sum; the relations in the order of the groups that one call of an op takes; their detached losses.

    Under reduction "none" there is one relation, and its rows (1, B, R, N) stand for the weighted sum.
    """
    checks.check_temperature(temperature)
    checks.check_relation_heads(relation_heads)
    first = next(iter(sides.values()))[0]
    device, (batch, _, length, _) = first.device, first.shape
    checks.check_pattern(pattern, batch, length, device)
    groups: list[tuple[Any, dict[str, Sides]]] = []
    for name, (x_t, y_t, x_s, y_s) in sides.items():
        is_self = y_t is x_t and y_s is x_s
        x_t, y_t = relation_pair(x_t, y_t, relation_heads, "teacher")
        x_s, y_s = relation_pair(x_s, y_s, relation_heads, "student")
        checks.check_equal_heads(name, x_t.shape[1], x_s.shape[1])
        tensors = (x_t, y_t, x_s, y_s)
        kind = is_self, [(x.shape, x.stride(), x.dtype) for x in ((x_t, x_s) if is_self else tensors)]
        for known, group in groups:  # compared, not hashed: a hash would fix the lengths of a compiled graph
            if known == kind:
                group[name] = tensors
                break
        else:
            groups.append((kind, {name: tensors}))
    chosen = checks.choose_implementation(
        implementation, [x for _, group in groups for x in next(iter(group.values()))]
    )
    wide = torch.promote_types(x_s.dtype, torch.float32)
    allowed, row_weight, factor = allowed_keys(pattern, reduction, batch, length, device, wide)
    relations = []
    for (is_self, *_), group in groups:
        xs_t, ys_t, xs_s, ys_s = ([tensors[i] for tensors in group.values()] for i in range(4))
        heads, d_t, d_s = xs_t[0].shape[1], xs_t[0].shape[3], xs_s[0].shape[3]
        relations.append(
            Relations(
                xs_t,
                [] if is_self else ys_t,
                xs_s,
                [] if is_self else ys_s,
                *allowed,
                row_weight,
                factor if reduction in ("sum", "none") else factor / heads,
                1 / (math.sqrt(d_t) * temperature),
                1 / (math.sqrt(d_s) * temperature),
                symmetric=not pattern.causal,
                sums=reduction != "none",
            )
        )
    group_weights = [[weights[name] for name in group] for _, group in groups]
    if chosen == "reference":
        total, values = reference_losses(relations, group_weights, pattern)
    else:
        total, values = relation_losses(relations, group_weights, chosen)
    return total, [name for _, group in groups for name in group], values
