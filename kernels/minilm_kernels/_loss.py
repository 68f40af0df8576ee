"""The public functions: one relation, and the weighted sum of relations that MiniLM trains with.

B batch, H heads of a model, R relation heads, N tokens, D head dimension of a model, S packed sequences.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minilm_kernels import _checks as checks
from minilm_kernels._allowed import Pattern, allowed_keys
from minilm_kernels._autograd import relation_op
from minilm_kernels._heads import relation_pair
from minilm_kernels._reference import reference_rows

Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


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
    weights = checks.relation_weights(relations)
    losses = relation_losses(
        teacher,
        student,
        list(weights),
        relation_heads,
        attention_mask,
        causal,
        prefix_lengths,
        cu_seqlens,
        temperature,
        reduction,
        implementation,
    )
    return weighted_sum(losses, weights)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · loss over the relations (MiniLM eq. 10), not divided by the weights' sum."""
    terms = [loss if weights[name] == 1 else loss * weights[name] for name, loss in losses.items()]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def relation_losses(
    teacher: Triple,
    student: Triple,
    relations: Sequence[str],
    relation_heads: int | None = None,
    attention_mask: Tensor | None = None,
    causal: bool = False,
    prefix_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sequence",
    implementation: str | None = None,
) -> dict[str, Tensor]:
    """Each relation's loss by name, before weighting; arguments and errors as in `fused_minilm_loss`."""
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    teacher_tensors = checks.check_triple("teacher", teacher, relations)
    student_tensors = checks.check_triple("student", student, relations)
    checks.check_same_place(teacher_tensors, student_tensors)
    pattern = Pattern(attention_mask, causal, prefix_lengths, cu_seqlens)
    sides = [
        (teacher_tensors[x], teacher_tensors[y], student_tensors[x], student_tensors[y]) for x, y in relations
    ]
    losses = _relations(list(relations), sides, relation_heads, pattern, temperature, reduction, implementation)
    return dict(zip(relations, losses, strict=True))


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
    name = "xx" if y_t is x_t and y_s is x_s else "xy"
    sides = [(x_t, y_t, x_s, y_s)]
    return _relations([name], sides, relation_heads, pattern, temperature, reduction, implementation)[0]


def _relations(
    names: list[str],
    sides: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    relation_heads: int | None,
    pattern: Pattern,
    temperature: float,
    reduction: str,
    implementation: str | None,
) -> list[Tensor]:
    """One loss a relation, (B, R, N) rows under "none"."""
    checks.check_temperature(temperature)
    checks.check_relation_heads(relation_heads)
    batch, _, length, _ = sides[0][0].shape
    device = sides[0][0].device
    checks.check_pattern(pattern, batch, length, device)
    split = [
        (*relation_pair(x_t, y_t, relation_heads, "teacher"), *relation_pair(x_s, y_s, relation_heads, "student"))
        for x_t, y_t, x_s, y_s in sides
    ]
    for name, (x_t, _, x_s, _) in zip(names, split, strict=True):
        checks.check_equal_heads(name, x_t.shape[1], x_s.shape[1])
    chosen = checks.choose_implementation(implementation, [x for tensors in split for x in tensors])
    wide = torch.promote_types(split[0][2].dtype, torch.float32)
    allowed, weight = allowed_keys(pattern, reduction, batch, length, device, wide)
    losses = []
    for x_t, y_t, x_s, y_s in split:
        row_weight = weight if reduction in ("sum", "none") else weight / x_t.shape[1]
        scale_t, scale_s = (1 / (math.sqrt(x.shape[3]) * temperature) for x in (x_t, x_s))
        if chosen == "reference":
            rows = reference_rows(x_t, y_t, x_s, y_s, pattern, scale_t, scale_s)
            losses.append(rows if reduction == "none" else (rows * row_weight).sum())
        else:
            sum_weight = None if reduction == "none" else row_weight
            losses.append(relation_op(x_t, y_t, x_s, y_s, allowed, sum_weight, scale_t, scale_s, chosen))
    return losses
