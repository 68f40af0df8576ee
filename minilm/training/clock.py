"""How long the optimiser steps take."""

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
