"""Soft-label distillation of the logits, which for a vocabulary are never held as a whole.

    L_OUT = T² KL(p ‖ q),   p = softmax(z_T / T), q = softmax(z_S / T)      (Hinton et al., arXiv 1503.02531, section 2)
    z = h Wᵀ + b,   G = d L_OUT / d z_S = T (q − p),   dh = G W,   dW = Gᵀ h,   db = the sum of G over the rows
A model with a vocabulary head runs up to the input h of its output embeddings and no further (`minilm.models.heads`);
the logits of a few rows at a time are made, used for the loss and all three gradients in the forward, and dropped. The
backward only scales.

B batch, N tokens, M rows (tokens or examples), V vocabulary, d hidden size.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from minilm.errors import UsageError
from minilm.models.batches import Batch, token_mask
from minilm.models.heads import ExampleOutput, Output, TokenOutput
from minilm.models.observe import Needs, Observed
from minilm.objectives.term import Term, Unit

CHUNK_ELEMENTS = {"cuda": 1 << 24, "cpu": 1 << 22}  # logits of one model in a chunk of rows: 64 and 16 MiB in float32

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
        unit: "tokens" of a vocabulary head, "examples" of a classifier.
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
        total, count = output_loss(student.output, teacher.output, self.temperature, token_mask(batch))
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
    student: tuple[Tensor | None, ...] = student_hidden, student_weight, student_bias
    if any(x is not None and unpack_dual(x).tangent is not None for x in student):  # which a detached one would lose
        raise NotImplementedError("soft_label_kl has no forward-mode derivative: use reverse mode")
    if not torch.is_grad_enabled():  # of which a Function's forward is not told
        student = _detached(*student)
    teacher = _detached(teacher_hidden, teacher_weight, teacher_bias)
    result: Tensor = _SoftLabelKL.apply(*student, *teacher, temperature)  # type: ignore[no-untyped-call]
    return result


def _detached(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach() for x in tensors)


class _SoftLabelKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        temperature: float,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        student, teacher = _Head(hidden, weight, bias, wide), _Head(teacher_hidden, teacher_weight, teacher_bias, wide)
        total = hidden.new_zeros((), dtype=wide)
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x, dtype=wide) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        step = max(1, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), step):
                rows = slice(start, start + step)
                log_p, log_q = teacher.log_softmax(rows, temperature), student.log_softmax(rows, temperature)
                p = log_p.exp()
                total += log_p.sub_(log_q).mul_(p).sum()
                if not any(ctx.needs_input_grad):
                    continue
                g = log_q.exp_().sub_(p).mul_(temperature)
                if d_bias is not None:
                    d_bias += g.sum(0)
                g = g.to(student.weight.dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[rows], g, student.weight)
                if d_weight is not None:
                    _add_product(d_weight, g.mT, student.hidden[rows])
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total.mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("soft_label_kl has first derivatives only: call backward without create_graph")
        gradients = (
            None if gradient is None else (gradient * grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None


class _Head:
    """Hidden states and output layer in the dtype of their product, whose result is `wide`."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> None:
        dtype = _product_dtype(hidden, wide)
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(wide)
        self.wide = wide

    def log_softmax(self, rows: slice, temperature: float) -> Tensor:
        """(rows, V)."""
        logits = _product(self.hidden[rows], self.weight.mT, self.wide)
        if self.bias is not None:
            logits += self.bias
        return torch.log_softmax(logits.div_(temperature), dim=1)


def _product_dtype(x: Tensor, wide: torch.dtype) -> torch.dtype:
    """Half precision where tensor cores add it up in float32, which elsewhere PyTorch does not offer."""
    if x.device.type != "cuda" or wide == torch.float64:
        return wide
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    return a @ b if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


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
