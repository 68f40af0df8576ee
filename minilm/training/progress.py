"""The progress bar: steps, and beside them the newest losses, tokens per second and the loss's share of the time."""

from typing import Any

from transformers import ProgressCallback

SHOWN = {
    "tokens_per_second": "{:,.0f} tokens/s",
    "images_per_second": "{:,.0f} images/s",
    "sequences_per_second": "{:,.0f} sequences/s",
    "loss_share": "{:.0%} in the loss",
}


class DistillationProgress(ProgressCallback):
    """As the Trainer's bar, but what is logged in training stands in the bar; an evaluation is a line of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(", ".join(_readable(logs)))
        elif "eval_loss" in logs:
            losses = {name.removeprefix("eval_"): value for name, value in logs.items() if _is_loss(name)}
            parts = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
            self.training_bar.write(f"step {state.global_step}: held-out {parts}")


def _readable(logs: dict[str, Any]) -> list[str]:
    losses = [f"{name} {logs[name]:.4f}" for name in logs if _is_loss(name)]
    return losses + [text.format(logs[name]) for name, text in SHOWN.items() if name in logs]


def _is_loss(name: str) -> bool:
    """The sum, the relations and the output loss; not rates, times and norms."""
    name = name.removeprefix("eval_")
    return name in ("loss", "output") or (len(name) == 2 and set(name) <= set("qkv"))
