"""How long the optimiser steps take, on a clock that nobody sets; and what the Trainer's tells that was set."""

import time
from typing import Any

from transformers import TrainerCallback


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


def plausible(logs: dict[str, float]) -> dict[str, float]:
    """Without times below zero and their rates: the Trainer takes evaluations by the wall's clock, which is set."""
    wrong = {name.removesuffix("_runtime") for name, value in logs.items() if name.endswith("_runtime") and value < 0}
    timed = {f"{prefix}_{what}" for prefix in wrong for what in ("runtime", "samples_per_second", "steps_per_second")}
    return {name: value for name, value in logs.items() if name not in timed}
