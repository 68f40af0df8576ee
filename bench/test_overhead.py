"""Time of one call of the loss and its backward, over that of a bare autograd Function that makes the same launches.

    pytest bench/test_overhead.py -n 0 --benchmark-only

The bare Function knows the launches beforehand, allocates what they write, and saves what they read; the difference of
the two minima is what everything else costs a call: checks, grouping, ops, arguments. On a GPU the launches are made,
without one both leave them out. B batch, R relation heads, N tokens, D head dimension.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from minilm import fused_minilm_loss
from minilm_kernels._triton._launch import Launch

B, R, D = 1, 2, 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [8, 200]  # rows on chip; sweeps
FORWARD = {"row_sweep": ("value", "lse_t", "lse_s", "dx"), "resident": ("value", "dx", "dy")}  # what kernels allocate
BACKWARD = {
    "key_sweep": ("dy",),
    "key_factors": ("base_t", "base_s", "factor_t", "factor_s"),
    "self_sweep": ("dx",),
    "scale_in_place": (),
}

Triple = tuple[Tensor, Tensor, Tensor]
Call = Callable[[], tuple[Tensor, ...]]  # the loss, and the gradients of the student's tensors


def tensors_of(argument: Any) -> list[Tensor]:
    if isinstance(argument, tuple):
        return [x for member in argument for x in tensors_of(member)]
    return [argument] if isinstance(argument, Tensor) else []


class Launches(NamedTuple):
    """Those of a forward or a backward, and tensors like the ones that they write."""

    launches: list[Launch]
    written: list[Tensor]

    @classmethod
    def of(cls, launches: list[Launch], writes: dict[str, tuple[str, ...]]) -> "Launches":
        own = [launch for launch in launches if launch.schedule.kernel.__name__ in writes]
        written = [
            x
            for launch in own
            for name in writes[launch.schedule.kernel.__name__]
            for x in tensors_of(launch.operands[name])
        ]
        return cls(own, written)

    def run(self) -> None:
        for x in self.written:
            torch.empty_like(x)
        for launch in self.launches:
            launch.run(DEVICE)


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, forward: Launches, backward: Launches, gradients: Triple, teacher: Triple, *student: Tensor
    ) -> Tensor:
        forward.run()
        ctx.save_for_backward(*student, *teacher)
        ctx.rest = backward, gradients
        return torch.cat([launch.operands["value"].sum(1) for launch in forward.launches]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert len(ctx.saved_tensors) == 6
        backward, gradients = ctx.rest
        backward.run()
        return None, None, None, None, *gradients


@pytest.fixture(params=LENGTHS, ids=lambda n: f"n={n}")
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Call, Call]:
    """MiniLM v1 by the loss and by the bare Function: QK, then VV."""
    torch.manual_seed(0)
    q_t, k_t, v_t, *leaves = (torch.randn(B, R, request.param, D, device=DEVICE).to(torch.bfloat16) for _ in range(6))
    q_s, k_s, v_s = (x.requires_grad_() for x in leaves)
    teacher, student = (q_t, k_t, v_t), (q_s, k_s, v_s)

    def ours() -> tuple[Tensor, ...]:
        loss = fused_minilm_loss(teacher, student, implementation="triton")
        return loss, *torch.autograd.grad(loss, student)

    made: list[Launch] = []
    run = Launch.run

    def watched(launch: Launch, device: torch.device) -> None:
        made.append(launch)
        run(launch, device)

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", watched)
        _, *gradients = ours()
    forward, backward = Launches.of(made, FORWARD), Launches.of(made, BACKWARD)
    assert len(made) == len(forward.launches) + len(backward.launches)

    def bare() -> tuple[Tensor, ...]:
        loss = _Bare.apply(forward, backward, gradients, teacher, *student)  # type: ignore[no-untyped-call]
        return loss, *torch.autograd.grad(loss, student)

    return ours, bare


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(Launch, "run", lambda launch, device: None)


def test_they_agree(calls: tuple[Call, Call]) -> None:
    ours, bare = calls
    for x, expected in zip(bare(), ours(), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.usefixtures("timed")
def test_bare_function(benchmark: Any, calls: tuple[Call, Call]) -> None:
    benchmark(calls[1])


@pytest.mark.usefixtures("timed")
def test_fused_minilm_loss(benchmark: Any, calls: tuple[Call, Call]) -> None:
    benchmark(calls[0])
