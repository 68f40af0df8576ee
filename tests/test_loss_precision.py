"""Scores that float32 holds coarsely, and a student that almost agrees: where a loss of differences cancels."""

import pytest
import torch
from loss_cases import Case, assert_within_eager_error, build, evaluate
from torch import Tensor

from minilm_kernels import relation_kl


def eager(sides: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean of the rows of a self relation, as eager code has it, and the gradient."""
    x_t, x_s = (x.to(dtype) for x in sides)
    x_s.requires_grad_()
    log_p, log_q = (torch.log_softmax(x @ x.mT / x.shape[-1] ** 0.5, -1) for x in (x_t, x_s))
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return loss.detach(), *torch.autograd.grad(loss, x_s)


def with_common_part(size: float, distance: float) -> list[Tensor]:
    """All tokens share a large vector, as massive activations do: large scores that differ by about 1."""
    generator = torch.Generator().manual_seed(0)
    x_t = size * torch.randn(1, 2, 1, 16, generator=generator) + torch.randn(1, 2, 24, 16, generator=generator) / size
    return [x_t, x_t * (1 + distance * torch.randn(x_t.shape, generator=generator))]


def one_hot(size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(2, 2, 24, 8, generator=generator), torch.randn(2, 2, 24, 16, generator=generator)]


SIDES = {f"one-hot {size:g}": one_hot(size) for size in (1.0, 100.0, 1e4)} | {
    f"common part {size:g}, {distance:g} away": with_common_part(size, distance)
    for size in (3.0, 10.0, 100.0)
    for distance in (1e-3, 1e-4)
}


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_at_most_twice_the_error_of_eager_code(sides: list[Tensor], implementation: str, device: str) -> None:
    sides = [x.to(device) for x in sides]
    x_t, x_s = sides[0], sides[1].clone().requires_grad_()
    loss = relation_kl(x_t, x_t, x_s, x_s, implementation=implementation)
    (gradient,) = torch.autograd.grad(loss, x_s)
    (eager_loss, eager_gradient), (exact_loss, exact_gradient) = (
        eager(sides, t) for t in (torch.float32, torch.float64)
    )
    rounding = 2e-7 * exact_loss.item() + 1e-8  # the order of a sum, by chance in eager code's favour
    assert abs(loss.item() - exact_loss.item()) <= 2 * abs(eager_loss.item() - exact_loss.item()) + rounding
    assert_within_eager_error(gradient, eager_gradient, exact_gradient, floor=1e-7)


def test_a_loss_is_not_negative_beyond_rounding(implementation: str, device: str) -> None:
    """Near students of one-hot rows: eager code stays within an epsilon of 0."""
    generator = torch.Generator().manual_seed(0)
    for size in (10.0, 60.0, 300.0):
        x_t = size * torch.randn(1, 2, 24, 16, generator=generator)
        x_s = x_t * (1 + 1e-5 * torch.randn(x_t.shape, generator=generator))
        x_t, x_s = x_t.to(device), x_s.to(device)
        rows = relation_kl(x_t, x_t, x_s, x_s, reduction="none", implementation=implementation)
        assert rows.min().item() >= -2e-7


@pytest.mark.parametrize("n", [19, 70])  # on chip, sweeps
def test_a_cold_float16_students_gradient_is_finite(n: int, fused: str, device: str) -> None:
    """Before the row weights it would be 40,000 times a difference of two tokens, which float16 does not hold.

    Scores are up to 6e5, and 16-bit sweeps of a self relation err by a rounding of the largest, 2 % of a probability.
    Eager code has only NaN here.
    """
    float16 = (torch.float16, torch.float16)
    case = Case(
        id="cold",
        n=n,
        teacher=(1, 1, 4),
        student=(1, 1, 4),
        relations=("qk", "vv"),
        scale=4.0,
        temperature=1e-4,
        dtypes=float16,
    )
    inputs = build(case, device)
    exact = evaluate(inputs, "reference", torch.float64)
    for g, g_exact in zip(evaluate(inputs, fused).gradients, exact.gradients, strict=True):
        assert (g - g_exact).norm() <= 2e-2 * g_exact.norm()
