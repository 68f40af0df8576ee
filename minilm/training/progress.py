"""The progress bar: steps, and beside them the newest losses and tokens per second."""

from collections.abc import Iterable
from typing import Any

from transformers import ProgressCallback

SHOWN = {
    "tokens_per_second": "{:,.0f} tokens/s",
    "images_per_second": "{:,.0f} images/s",
    "sequences_per_second": "{:,.0f} sequences/s",
}


class DistillationProgress(ProgressCallback):
    """As the Trainer's bar, but what is logged in training stands in the bar; an evaluation is a line of its own."""

    def __init__(self, parts: Iterable[str]) -> None:
        """Args: parts: of the loss, which are shown beside it."""
        super().__init__()
        self._losses = ("loss", *parts)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            rates = [text.format(logs[name]) for name, text in SHOWN.items() if name in logs]
            self.training_bar.set_postfix_str(", ".join([*self._values(logs, ""), *rates]))
        elif "eval_loss" in logs:
            losses = ", ".join(self._values(logs, "eval_"))
            self.training_bar.write(f"step {state.global_step}: held-out {losses}")

    def _values(self, logs: dict[str, Any], prefix: str) -> list[str]:
        named = {prefix + loss: loss for loss in self._losses}
        return [f"{named[name]} {value:.4f}" for name, value in logs.items() if name in named]
