"""Opt-in tuning: the fastest candidate is kept for calls of its kind, and only for those."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minilm_kernels import fused_minilm_loss, tune
from minilm_kernels._triton import _tune
from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import Tiles

WANTED = Tiles(32, 64, 4, 3)


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    _tune._State.fastest.clear()
    yield
    _tune._State.fastest.clear()


def fastest_is_wanted(launch: Launch, device: torch.device) -> float:
    """In place of a clock, which there is none of in the interpreter."""
    shape = Tiles(launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"], launch.num_warps, launch.num_stages)
    return 1.0 if shape == WANTED else 2.0


def inputs(device: str, length: int = 70) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        tuple(torch.randn(1, 2, length, dim, generator=generator).to(device) for _ in range(3)) for dim in (26, 12)
    )
    return teacher, tuple(x.requires_grad_() for x in student)


def test_keeps_the_fastest_and_stays_right(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tune, "_time", fastest_is_wanted)
    teacher, student = inputs(device)
    found = tune(lambda: fused_minilm_loss(teacher, student, implementation="triton").backward())
    assert len(found) == 4  # forward with dX and the sweep for dY of QK; forward and sweep of VV
    assert set(found.values()) == {WANTED}

    for x in student:
        x.grad = None
    fused_minilm_loss(teacher, student, implementation="triton").backward()
    got = [x.grad for x in student]
    expected = torch.autograd.grad(fused_minilm_loss(teacher, student, implementation="reference"), student)
    for gradient, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_other_calls_keep_the_pinned_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tune, "_time", fastest_is_wanted)
    teacher, student = inputs(device)
    tune(lambda: fused_minilm_loss(teacher, student, ("vv",), implementation="triton").backward())
    used: list[tuple[int, int]] = []
    run = Launch.run

    def spy(launch: Launch, where: torch.device) -> None:
        if "BLOCK_M" in launch.arguments:
            used.append((launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]))
        run(launch, where)

    monkeypatch.setattr(Launch, "run", spy)
    fused_minilm_loss(teacher, student, ("vv",), implementation="triton").backward()
    assert used == [WANTED[:2], WANTED[:2]]
    used.clear()
    fused_minilm_loss(*inputs(device, length=130), ("vv",), implementation="triton").backward()
    assert used
    assert WANTED[:2] not in used
