"""A run of the command line that is stopped by a signal and continued, beside one that is not."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from minilm.training.trainer import DistillationTrainer

STEPS = [
    *("--max_length", "16", "--max_steps", "4", "--per_device_train_batch_size", "8", "--logging_steps", "1"),
    *("--disable_tqdm", "true", "--use_cpu", "--save_steps", "10", "--learning_rate", "1e-2"),
]


class Stop(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder, "model.safetensors"))


@contextmanager
def each_trainer_with(callback: type[TrainerCallback], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While entered, every new trainer has one of these."""
    initialise = DistillationTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            DistillationTrainer,
            "__init__",
            lambda self, **options: (initialise(self, **options), self.add_callback(callback()))[0],
        )
        yield


def run_whole_and_in_two(command: CommandLine, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> str:
    """Into the folders "whole" and "two", which must come to the same bits; returns what the first one says."""
    code, out, err = command(*argv, "--output_dir", "whole")
    assert (code, err) == (0, ""), err
    with each_trainer_with(Stop, monkeypatch):
        assert command(*argv, "--output_dir", "two")[0] == 128 + signal.SIGTERM
    code, _, err = command(*argv, "--output_dir", "two", "--resume_from_checkpoint", "auto")
    assert (code, err) == (0, ""), err
    whole, two = weights("whole"), weights("two")
    assert whole.keys() == two.keys()
    assert all(torch.equal(x, two[name]) for name, x in whole.items())
    return out
