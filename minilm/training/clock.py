"""What part of a training step the loss takes, without stopping the device to look.

A moment is a CUDA event on a GPU, read when the times are asked for, and the wall clock elsewhere. The loss begins and
ends twice in a step: in the forward around its call, in the backward from the gradient of the loss to the last gradient
of what it was computed from.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

Moment = float | torch.cuda.Event


class LossClock:
    """Adds up the time between pairs of moments, if enabled; not under torch.compile, where no one can look inside."""

    def __init__(self) -> None:
        self.enabled = False  # who enables it must ask for the seconds again and again, or moments pile up
        self._spans: list[tuple[Moment, Moment]] = []
        self._backward: tuple[Moment, Moment] | None = None

    @contextmanager
    def forward(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Around the call of the loss on tensors of its device; in an evaluation it is not counted."""
        if not self._watches() or not torch.is_grad_enabled():
            yield
            return
        begin = _now(tensors[0])
        yield
        self._spans.append((begin, _now(tensors[0])))

    def backward(self, loss: Tensor, student: Sequence[Tensor]) -> None:
        """Watches the backward from the loss to the student's tensors."""
        if not self._watches() or not loss.requires_grad:
            return
        loss.register_hook(self._begin)
        for tensor in student:
            if tensor.requires_grad:
                tensor.register_hook(self._end)

    def seconds(self) -> float:
        """Since the last call; on a GPU it waits for the last of the moments."""
        self._close()
        spans, self._spans = self._spans, []
        return sum(_seconds(begin, end) for begin, end in spans)

    def _watches(self) -> bool:
        return self.enabled and not torch.compiler.is_compiling()

    def _begin(self, gradient: Tensor) -> None:
        self._close()
        now = _now(gradient)
        self._backward = now, now

    def _end(self, gradient: Tensor) -> None:
        if self._backward is not None:
            self._backward = self._backward[0], _now(gradient)

    def _close(self) -> None:
        if self._backward is not None:
            self._spans.append(self._backward)
            self._backward = None


class StepClock(TrainerCallback):
    """Wall time of optimiser steps with their data; evaluation, logging and saving are left out."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._begin: float | None = None

    def start(self) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._begin is not None:
            self._seconds += time.perf_counter() - self._begin
            self._begin = None

    def seconds(self) -> float:
        """Since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _now(tensor: Tensor) -> Moment:
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
