"""Runs `minilm-train` once as it is and once killed again and again, each time in a process forked from this one."""

import gc
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback

from minilm.cli import distill, main

MOMENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end")
COMMON = [
    *("--student_num_layers", "2", "--student_hidden_size", "16", "--max_length", "24", "--max_steps", "16"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"),
    *("--save_steps", "2", "--logging_steps", "2", "--disable_tqdm", "true", "--report_to", "none", "--use_cpu"),
]


class KillAt(TrainerCallback):
    """The process ends as if its power were cut, at one of four moments of a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        setattr(self, MOMENTS[step % len(MOMENTS)], self.kill)

    def kill(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(argv: list[str], kill_at: int | None) -> int:
    """Exit status of `minilm-train argv`, as `os.waitpid` gives it."""
    return os.waitpid(forked(argv, kill_at), 0)[1]


def forked(argv: list[str], kill_at: int | None) -> int:
    """The id of a process, of a group of its own, that runs `minilm-train argv`."""
    if child := os.fork():
        return child
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if kill_at is not None:
        initialise = distill.DistillationTrainer.__init__

        def killed(self: Any, **options: Any) -> None:
            initialise(self, **options)
            self.add_callback(KillAt(kill_at))

        distill.DistillationTrainer.__init__ = killed  # type: ignore[method-assign]
    os._exit(main(argv))


def run(folder: Path, teacher: str, data: str, kills: list[int], flags: list[str]) -> dict[str, Any]:
    """The exit signals of the runs, and whether the two students are equal, bit for bit.

    Args:
        kills: in each of these steps the process is killed.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    gc.freeze()  # what the imports made: each run collects garbage when it begins
    distill.SPEED_SECONDS = 0.01
    argv = ["--teacher", teacher, "--data", data, *COMMON, *flags]
    whole, broken = folder / "whole", folder / "broken"
    ends = [in_a_child([*argv, "--output_dir", str(whole)], None)]
    again: list[str] = []
    for kill in [*kills, None]:
        ends.append(in_a_child([*argv, "--output_dir", str(broken), *again], kill))
        again = ["--resume_from_checkpoint", "auto"]
    students = [(path / "model.safetensors").read_bytes() for path in (whole, broken)]
    logs = [
        json.loads((path / "checkpoint-16" / "trainer_state.json").read_text())["log_history"]
        for path in (whole, broken)
    ]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    resumed_from = json.loads((broken / "metrics.json").read_text())["steps_before_resuming"]
    return {"ends": ends, "equal": students[0] == students[1], "losses": losses, "resumed_from": resumed_from}
