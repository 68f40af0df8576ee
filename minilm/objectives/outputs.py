"""Soft-label distillation of the logits, which for a vocabulary are never held as a whole.

    L_OUT = T² KL(p ‖ q),   p = softmax(z_T / T), q = softmax(z_S / T)      (Hinton et al., arXiv 1503.02531, section 2)
    d L_OUT / d z_S = T (q − p)
A model with a vocabulary head runs up to the input h of its output embeddings and no further (`minilm.models.heads`);
its logits are made a few rows at a time (`minilm.objectives.chunks`).

B batch, N tokens, M rows (tokens or examples), V vocabulary, d hidden size.
"""

from numbers import Real

import torch
from torch import Tensor

from minilm.errors import UsageError
from minilm.models.batches import NO_LABEL, Batch, labels_of, token_mask
from minilm.models.heads import ExampleOutput, Output, TokenOutput
from minilm.models.observe import Needs, Observed
from minilm.objectives.chunks import Head, detached, sum_over_rows
from minilm.objectives.term import Term, Unit

LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-18, 1e18


def output_loss(
    student: Output,
    teacher: Output,
    temperature: float = 1.0,
    attention_mask: Tensor | None = None,  # (B, N), nonzero = token
) -> tuple[Tensor, Tensor]:
    """L_OUT in nats summed over the tokens (or the examples of a classifier), and how many they are.

    The sum is a float32 scalar with gradients for the student only, the count an integer scalar, both on the student's
    device: divide by the count of all that a step holds. What stands behind the mask changes nothing.

    Raises:
        ValueError: a vocabulary head and a classifier; logits or a mask of other sizes; a temperature that is not
            positive.
    """
    if isinstance(student, ExampleOutput) and isinstance(teacher, ExampleOutput):
        total = _example_kl(student.logits, teacher.logits, temperature)
        return total, _count(student.logits)
    if not (isinstance(student, TokenOutput) and isinstance(teacher, TokenOutput)):
        kinds = [type(output).__name__ for output in (teacher, student)]
        raise UsageError(
            f"the teacher gives a {kinds[0]} and the student a {kinds[1]}: both need the same kind of head"
        )
    if student.hidden.shape[:2] != teacher.hidden.shape[:2]:
        raise UsageError(
            f"the teacher's output is for (batch, tokens) {tuple(teacher.hidden.shape[:2])}, "
            f"the student's for {tuple(student.hidden.shape[:2])}"
        )
    if attention_mask is None:
        rows_s, rows_t = (output.hidden.flatten(0, 1) for output in (student, teacher))
    elif attention_mask.shape != student.hidden.shape[:2]:
        raise UsageError(
            f"attention_mask is {tuple(attention_mask.shape)}, (batch, tokens) is {tuple(student.hidden.shape[:2])}"
        )
    else:  # one index for both: finding it waits for the device
        index = attention_mask.flatten().nonzero().squeeze(1)
        rows_s, rows_t = (output.hidden.flatten(0, 1).index_select(0, index) for output in (student, teacher))
    total = soft_label_kl(rows_s, student.weight, student.bias, rows_t, teacher.weight, teacher.bias, temperature)
    return total, _count(rows_s)


class SoftLabels(Term):
    """L_OUT of the two models' heads as the part "output": its mean over the tokens, of classifiers over the examples.

    Args:
        unit: "tokens" of a vocabulary head, or those of them that have "labels"; "examples" of a classifier.
        weight: of the part in the loss.
        temperature: T.

    Raises:
        ValueError, TypeError: a temperature as `check_temperature` refuses it.
    """

    teacher = student = Needs(output=True)

    def __init__(self, unit: Unit, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.unit = unit
        self.parts = {"output": weight}
        self.temperature = temperature

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert teacher.output is not None
        assert student.output is not None
        mask = labels_of(batch) != NO_LABEL if self.unit == "labels" else token_mask(batch)
        total, count = output_loss(student.output, teacher.output, self.temperature, mask)
        mean = total / count.clamp(min=1)
        return self.parts["output"] * mean, {"output": mean.detach()}


def soft_label_kl(
    student_hidden: Tensor,  # (M, d_s)
    student_weight: Tensor,  # (V, d_s)
    student_bias: Tensor | None,  # (V,)
    teacher_hidden: Tensor,  # (M, d_t)
    teacher_weight: Tensor,  # (V, d_t)
    teacher_bias: Tensor | None,  # (V,)
    temperature: float = 1.0,
) -> Tensor:
    """T² KL(softmax(z_T / T) ‖ softmax(z_S / T)) in nats, summed over the rows: a float32 scalar (float64 of float64).

    Memory is linear in M and in V. Sums and softmax are float32; on CUDA the products take half-precision inputs, or
    under autocast its dtype, with float32 results. The student's tensors get gradients in their own dtype, the
    teacher's none. Backward may run twice; second derivatives raise `RuntimeError`, forward mode `NotImplementedError`.

    Raises:
        ValueError: numbers of rows, vocabularies or widths that do not match; a temperature that is not positive or
            beyond 1e-18 to 1e18.
        TypeError: a temperature that is no number.
    """
    check_temperature(temperature)
    for who, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.shape[1] != weight.shape[1]:
            raise UsageError(f"the {who}'s hidden states are {hidden.shape[1]} wide, its weight {weight.shape[1]}")
    if len(student_hidden) != len(teacher_hidden):
        raise UsageError(f"the teacher has {len(teacher_hidden)} rows, the student {len(student_hidden)}")
    if len(student_weight) != len(teacher_weight):
        raise UsageError(f"the teacher's vocabulary is {len(teacher_weight)}, the student's {len(student_weight)}")
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    teacher_head = Head(*detached(teacher_hidden, teacher_weight, teacher_bias), wide)

    def kl(log_q: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        log_p = teacher_head.log_softmax(rows, temperature)
        p = log_p.exp()
        total = log_p.sub_(log_q).mul_(p).sum()
        return total, log_q.exp_().sub_(p) if with_gradient else None

    return sum_over_rows(student_hidden, student_weight, student_bias, kl, temperature)


def _example_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    check_temperature(temperature)
    if student.shape != teacher.shape:
        raise UsageError(
            f"the teacher's logits are (batch, classes) {tuple(teacher.shape)}, the student's {tuple(student.shape)}"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (torch.log_softmax(z.to(wide) / temperature, dim=1) for z in (teacher.detach(), student))
    return (log_p.exp() * (log_p - log_q)).sum() * temperature**2


def _count(rows: Tensor) -> Tensor:
    return torch.full((), len(rows), device=rows.device)  # of the device itself, where a copy would wait


def check_temperature(temperature: float) -> None:
    """Raises `TypeError` for what is no number, `ValueError` where T² or z / T has no place in float32."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, not a {type(temperature).__name__}")
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature}: it must be positive")
    if not LEAST_TEMPERATURE <= temperature <= GREATEST_TEMPERATURE:
        raise UsageError(
            f"temperature is {temperature}: it must lie between {LEAST_TEMPERATURE:g} and {GREATEST_TEMPERATURE:g}"
        )
