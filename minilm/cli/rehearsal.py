"""A dry run: three real steps of a run that leaves nothing behind, and what they say of the whole."""

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from minilm.training.checkpoints import CheckpointingTrainer

STEPS = 3


def unsaved(training: TrainingArguments, folder: str) -> TrainingArguments:
    """The same training with nothing saved or reported, in a folder to be removed."""
    changed = copy.copy(training)
    changed.output_dir = folder
    changed.resume_from_checkpoint = None
    changed.report_to = []
    changed.push_to_hub = changed.load_best_model_at_end = False
    changed.save_strategy = type(training.save_strategy)("no")
    return changed


def rehearsal_arguments(training: TrainingArguments, folder: str) -> TrainingArguments:
    """The same training, three steps of it, with nothing saved, evaluated or reported; in a folder to be removed."""
    rehearsal = unsaved(training, folder)
    rehearsal.max_steps = STEPS
    rehearsal.eval_on_start = False
    for strategy in ("eval_strategy", "logging_strategy"):
        setattr(rehearsal, strategy, type(getattr(training, strategy))("no"))
    return rehearsal


def rehearse(trainer: CheckpointingTrainer, training: TrainingArguments) -> str:
    """Takes the steps and tells the memory they needed, and the time that all steps of `training` will take."""
    times = _StepTimes()
    trainer.add_callback(times)
    trainer.train()
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt
    (_, *later), steps = times.seconds, total_steps(trainer, training)
    step = sum(later) / len(later)
    return "\n".join(
        [
            f"memory     {_peak_memory(training.device)} at its peak, {_trained(trainer)}",
            f"time       {step:.3g} s a step, {_duration(step * steps)} for {steps:,} of them, without evaluation",
            "",
            f"A dry run: {STEPS} steps were taken, nothing was written.",
        ]
    )


@dataclass
class _StepTimes(TrainerCallback):
    seconds: list[float] = field(default_factory=list)
    _begin: float = 0.0

    def on_step_begin(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        self._begin = _now(args.device)

    def on_step_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        self.seconds.append(_now(args.device) - self._begin)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def total_steps(trainer: Trainer, training: TrainingArguments) -> int:
    """Optimiser steps of the whole training."""
    if training.max_steps > 0:
        return training.max_steps
    sequences = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return math.ceil(math.ceil(len(trainer.train_dataset) / sequences) * training.num_train_epochs)  # type: ignore


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of {torch.cuda.get_device_name(device)}"
    return f"{_peak_resident() / 2**30:.1f} GiB of main memory"


def _peak_resident() -> int:
    """Bytes of this process; a child's ru_maxrss would begin with its parent's."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trained(trainer: Trainer) -> str:
    assert trainer.model is not None
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return f"{count / 1e6:.1f}M parameters trained"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
