"""What autograd asks for: gradcheck, retain_graph, accumulation, and second derivatives or an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from loss_cases import Case, build
from torch import Tensor
from torch.autograd import forward_ad, functional

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
    penalty = torch.stack([g.square().sum() for g in grads(weight * loss, student, create_graph=True)]).sum()
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
    torch.stack([g.square().sum() for g in grads(loss, student, create_graph=True)]).sum().backward()
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


TANGENT = torch.tensor([[[[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]]]])
Function = Callable[[Tensor], Tensor]


def through_dual_tensors(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, TANGENT.to(x.device)))).tangent


def without_grad(f: Function, x: Tensor) -> Tensor:
    with torch.no_grad():
        return through_dual_tensors(f, x)


def batched(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, torch.ones(3, device=x.device), is_grads_batched=True)[0]


TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (TANGENT.to(x.device),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "functional.jvp": lambda f, x: functional.jvp(f, x, TANGENT.to(x.device)),
    "functional.hvp": lambda f, x: functional.hvp(f, x, TANGENT.to(x.device)),
    "functional.jacobian, forward": lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "functional.jacobian, vectorized": lambda f, x: functional.jacobian(f, x, vectorize=True),
    "dual tensors": through_dual_tensors,
    "dual tensors that require grad": lambda f, x: through_dual_tensors(f, x.clone().requires_grad_()),
    "dual tensors without grad": without_grad,
    "batched gradients": batched,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode's own use
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_transforms_are_refused_or_right(transform: str, masked: bool, implementation: str, device: str) -> None:
    """Never silently 0: only the reference has rules for them, and masks are no hindrance there."""
    generator = torch.Generator().manual_seed(0)
    x_t, x_s = (torch.randn(1, 1, 3, 2, generator=generator).to(device) for _ in range(2))
    mask = torch.tensor([[1, 1, 0]], device=device) if masked else None

    def f(x: Tensor) -> Tensor:
        return relation_kl(x_t, x_t, x, x_s, attention_mask=mask, implementation=implementation)

    if implementation == "reference":
        TRANSFORMS[transform](f, x_s)
    else:
        with pytest.raises(RuntimeError, match=r"^implementation='\w+' .* implementation='reference'$"):
            TRANSFORMS[transform](f, x_s)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode's own use
def test_a_tangent_of_the_teacher_is_that_of_a_constant(implementation: str, device: str) -> None:
    x_s = TANGENT.flip(2).to(device)
    assert through_dual_tensors(lambda x: relation_kl(x, x, x_s, x_s, implementation=implementation), x_s) is None
