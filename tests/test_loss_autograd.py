"""What autograd asks for: gradcheck, retain_graph, accumulation, and second derivatives or an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from loss_cases import Case, build
from torch import Tensor

from minilm_kernels import fused_minilm_loss, relation_kl

pytestmark = pytest.mark.usefixtures("nan_filled")

FP64 = torch.float64
TINY = {"teacher": (2, 2, 3), "student": (2, 2, 2), "dtypes": (FP64, FP64)}
CASES = [
    Case(id="cross and self", n=4, relations=("qk", "vv"), **TINY),
    Case(id="all pairs", n=3, relations=tuple(x + y for x in "qkv" for y in "qkv"), **TINY),
    Case(id="masked", n=4, batch=2, masks=("holes", "empty"), **TINY),
    Case(id="causal", n=4, causal=True, relations=("qk", "qq"), **TINY),
    Case(id="prefix", n=4, batch=2, causal=True, prefix=(3, 1), masks=("left", "full"), **TINY),
    Case(id="packed", n=6, packed=(0, 2, 2, 5), reduction="token", **TINY),
    Case(id="grouped", n=4, teacher=(4, 2, 3), student=(4, 2, 2), relations=("qk", "vv"), dtypes=(FP64, FP64)),
    Case(id="re-split", n=4, teacher=(2, 2, 6), student=(3, 3, 2), relation_heads=6, dtypes=(FP64, FP64)),
]


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradcheck(case: Case, implementation: str, device: str) -> None:
    inputs = build(case, device)
    student = tuple(x.requires_grad_() for x in inputs.student)

    def loss(*student: Tensor) -> Tensor:
        return fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=implementation)

    for letter, g in zip("qkv", grads(loss(*student), student), strict=True):
        assert (g is not None) == any(letter in relation for relation in inputs.options["relations"])
    own = implementation != "reference"  # autograd's own derivatives are checked along random directions only
    assert torch.autograd.gradcheck(loss, student, fast_mode=not own)
    if not own:
        assert torch.autograd.gradgradcheck(loss, student, fast_mode=True)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["both ways", "causal"])
def test_gradcheck_of_rows(options: dict[str, Any], implementation: str, device: str) -> None:
    inputs = build(CASES[0], device)
    (q_t, k_t, _), (q_s, k_s, _), _ = inputs
    options = options | {"reduction": "none", "implementation": implementation}
    mask = torch.tensor([[1, 0, 1, 1]], device=device)
    both = (q_s.requires_grad_(), k_s.requires_grad_())

    def cross(x: Tensor, y: Tensor) -> Tensor:
        return relation_kl(q_t, k_t, x, y, attention_mask=mask, **options)

    def self_relation(x: Tensor) -> Tensor:
        return relation_kl(q_t, q_t, x, x, attention_mask=mask, **options)

    assert torch.autograd.gradcheck(cross, both)
    assert torch.autograd.gradcheck(self_relation, both[:1])


def grads(loss: Tensor, student: tuple[Tensor, ...], **options: Any) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, student, allow_unused=True, **options)


SMALL = Case(id="autograd", n=19, batch=2, masks=("holes", "right"), relations=("qk", "vv"))


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_backward_twice(reduction: str, implementation: str, device: str) -> None:
    """With retain_graph the second backward gives the same bits, and .grad adds them up."""
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    if reduction == "none":
        loss = relation_kl(
            *inputs.teacher[:2], *student[:2], reduction="none", implementation=implementation
        ).square().sum()  # fmt: skip
        student = student[:2]
    else:
        loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=implementation)
    first = grads(loss, student, retain_graph=True)
    kept = [g.clone() for g in first]
    second = grads(loss, student, retain_graph=True)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, first, second, strict=True))
    loss.backward(retain_graph=True)
    loss.backward()
    for x, g in zip(student, kept, strict=True):
        assert torch.equal(x.grad, 2 * g)


def test_gradients_may_be_changed_in_place(fused: str, device: str) -> None:
    """As clipping does: what a backward returned is the caller's, a second backward must not see it."""
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=fused)
    first = grads(loss, student, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(7)
    assert all(torch.equal(a, b) for a, b in zip(kept, grads(loss, student), strict=True))


def test_scaling_the_loss_scales_the_gradients(implementation: str, device: str) -> None:
    """A loss scaler's power of two changes no bit; a negative factor turns the sign."""
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=implementation)
    plain = grads(loss, student, retain_graph=True)
    for factor in (1024.0, -2.0, 0.0):
        for g, g_plain in zip(grads(factor * loss, student, retain_graph=True), plain, strict=True):
            torch.testing.assert_close(g, factor * g_plain, rtol=1e-6, atol=0)


def test_under_activation_checkpointing(fused: str, device: str) -> None:
    """The forward runs again in the backward; gradients are the same bits."""
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)

    def loss(*student: Tensor) -> Tensor:
        return fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=fused)

    checkpointed = torch.utils.checkpoint.checkpoint(loss, *student, use_reentrant=False)
    for g, g_plain in zip(grads(checkpointed, student), grads(loss(*student), student), strict=True):
        assert torch.equal(g, g_plain)


def test_rows_of_weight_zero_give_zeros(implementation: str, device: str) -> None:
    inputs = build(SMALL, device)
    x, y = (x.requires_grad_() for x in inputs.student[:2])
    rows = relation_kl(*inputs.teacher[:2], x, y, reduction="none", implementation=implementation)
    assert all(g.eq(0).all() for g in torch.autograd.grad(rows, (x, y), torch.zeros_like(rows)))


def test_changing_an_input_before_backward_raises(fused: str, device: str) -> None:
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    used = tuple(1 * x for x in student)
    loss = fused_minilm_loss(inputs.teacher, used, **inputs.options, implementation=fused)
    used[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("relation", ["qk", "vv"])
def test_gradient_penalty_raises(relation: str, fused: str, device: str) -> None:
    """The gradient of ones: grad_output needs no gradient itself."""
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    inputs.options["relations"] = (relation,)
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=fused)
    penalty = sum(g.square().sum() for g in grads(loss, student, create_graph=True) if g is not None)
    with pytest.raises(RuntimeError, match="reference"):
        penalty.backward()


def test_gradient_penalty_beside_another_loss_raises(fused: str, device: str) -> None:
    """It must not come out silently without the penalty's share."""
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=fused)
    loss = loss + sum(x.square().sum() for x in student)
    total = loss + sum(g.square().sum() for g in grads(loss, student, create_graph=True))
    with pytest.raises(RuntimeError, match="reference"):
        total.backward()


def test_second_derivative_through_grad_output_raises(fused: str, device: str) -> None:
    """Here grad_output does need a gradient."""
    inputs = build(SMALL, device)
    weight = torch.ones((), device=device, requires_grad=True)
    student = tuple(x.requires_grad_() for x in inputs.student)
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=fused)
    penalty = sum(g.square().sum() for g in grads(weight * loss, student, create_graph=True))
    with pytest.raises(RuntimeError, match="reference"):
        penalty.backward()


def test_create_graph_alone_is_no_second_derivative(fused: str, device: str) -> None:
    """Gradients taken with create_graph=True and only looked at are right."""
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=fused)
    plain = grads(loss, student, retain_graph=True)
    for g, g_plain in zip(grads(loss, student, create_graph=True), plain, strict=True):
        assert torch.equal(g.detach(), g_plain)


def test_reference_supports_gradient_penalties(device: str) -> None:
    inputs = build(SMALL, device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation="reference")
    sum(g.square().sum() for g in grads(loss, student, create_graph=True)).backward()
    token = inputs.options["attention_mask"][:, None, :, None]
    for x in student:
        assert x.grad.isfinite().all()
        assert x.grad.masked_select(token).ne(0).all()
        assert x.grad.masked_select(~token).eq(0).all()


class _ReturnsNoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_an_undefined_gradient_stays_undefined(implementation: str, device: str) -> None:
    inputs = build(Case(id="undefined", n=7, relations=("qk", "vv")), device)
    student = [x.clone().requires_grad_() for x in inputs.student]
    loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=implementation)
    _ReturnsNoGradient.apply(loss).backward()  # type: ignore[no-untyped-call]
    assert all(x.grad is None for x in student)


def test_a_teacher_under_inference_mode(fused: str, device: str) -> None:
    """Its tensors cannot be saved for backward as others are."""
    inputs = build(Case(id="inference", n=37, student=(2, 2, 6)), device)
    with torch.inference_mode():
        teacher = tuple(x.clone() for x in inputs.teacher)
    student = tuple(x.requires_grad_() for x in inputs.student)
    expected, actual = (
        torch.autograd.grad(fused_minilm_loss(t, student, implementation=fused), student)
        for t in (inputs.teacher, teacher)
    )
    for g, g_expected in zip(actual, expected, strict=True):
        assert torch.equal(g, g_expected)


# torch scripts its own decompositions at the first forward-mode call
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def forward_mode(name: str) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """The derivative along (1, 1, ...), by one of PyTorch's ways to it."""
    ways: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
        "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        "jacfwd": lambda f, x: torch.func.jacfwd(f)(x).sum(),
        "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
        "jacobian": lambda f, x: torch.autograd.functional.jacobian(
            f, x, strategy="forward-mode", vectorize=True
        ).sum(),
    }
    return ways[name]


@FORWARD_MODE
@pytest.mark.parametrize("way", ["jvp", "jacfwd", "linearize", "jacobian"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_raises(way: str, requires_grad: bool, fused: str, device: str) -> None:
    x = torch.randn(1, 1, 4, 3, device=device, requires_grad=requires_grad)
    teacher = torch.randn(1, 1, 4, 3, device=device)
    with pytest.raises(RuntimeError, match=f"implementation='{fused}' has no forward-mode derivatives"):
        forward_mode(way)(lambda s: relation_kl(teacher, teacher, s, s, implementation=fused), x)


@FORWARD_MODE
def test_reference_has_forward_mode(device: str) -> None:
    x, teacher = (torch.randn(1, 1, 4, 3, device=device, dtype=torch.float64) for _ in range(2))

    def loss(s: Tensor) -> Tensor:
        return relation_kl(teacher, teacher, s, s, implementation="reference")

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    for way in ("jvp", "jacfwd"):
        torch.testing.assert_close(forward_mode(way)(loss, x.detach()), gradient.sum())


@FORWARD_MODE
def test_a_dual_teacher_is_a_constant(fused: str, device: str) -> None:
    student = torch.randn(1, 1, 4, 3, device=device)
    _, tangent = torch.func.jvp(
        lambda t: relation_kl(t, t, student, student, implementation=fused), (student + 1,), (student,)
    )
    assert tangent == 0
