"""What the training arguments ask for, tried once before work starts.

transformers looks at many of its arguments only when they are used: at the first step, after hours at the first
evaluation, or at the end. So what they choose is built here: the loaders with a batch of each, a forward and a
backward, the optimiser, the schedule. Weights, buffers, random state and the order of the data stay as they were, so a
run is bit by bit what it would have been.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from minilm.cli.rehearsal import total_steps
from minilm.data.streams import TextStream
from minilm.errors import NonFiniteError, UsageError, tried
from minilm.models.batches import Batch
from minilm.training.finite import all_finite
from minilm.training.model import DistillationModel
from minilm.training.trainer import DistillationTrainer


def try_out(trainer: DistillationTrainer) -> None:
    """Builds and runs what `trainer.train()` will need.

    The optimiser stays, because some hook themselves into the parameters and cannot be undone; `train` takes the one
    that is there.

    Raises:
        TrialError: something cannot be built or run with the trainer's arguments.
        NonFiniteError: the first batch gives a loss or a gradient that is NaN or infinite.
        OSError: the data cannot be read.
    """
    args = trainer.args
    wrapped = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # they take a model apart before it runs
    with _state_kept(trainer):
        with tried("cannot make a batch of the held-out data"):
            heldout = _first_batch(trainer.get_eval_dataloader())
        with tried("cannot make a batch of the training data"):
            loader = trainer.get_train_dataloader()
            # A stream reads `shuffle_buffer` texts for its first batch: too long to do it twice.
            is_stream = isinstance(trainer.train_dataset, TextStream)
            rows = args.train_batch_size
            batch = {name: x[:rows] for name, x in heldout.items()} if is_stream else _first_batch(loader)
        if args.torch_compile:
            with tried(f"cannot compile with {_flags(args, 'torch_compile_backend', 'torch_compile_mode')}"):
                # As accelerate will, but never called: compiling takes long, here only the mode is looked at.
                torch.compile(torch.nn.Identity(), **trainer.accelerator.state.dynamo_plugin.to_kwargs())
        if not wrapped and not args.auto_find_batch_size:  # which is there to try what may not fit
            with tried(f"cannot train on a batch of {args.per_device_train_batch_size}"):
                _forward_and_backward(trainer, batch)
        if not wrapped:
            with tried(f"cannot build the optimiser of {_flags(args, 'optim', 'optim_args', 'optim_target_modules')}"):
                trainer.create_optimizer()
            with tried(f"cannot build the schedule of {_flags(args, 'lr_scheduler_type', 'lr_scheduler_kwargs')}"):
                _build_schedule(trainer)


def _flags(args: Any, *names: str) -> str:
    """Those of the arguments that are set, as they are typed."""
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return " ".join(f"--{name} {getattr(value, 'value', value)}" for name, value in values.items())


@contextmanager
def _state_kept(trainer: DistillationTrainer) -> Iterator[None]:
    model, device = trainer.model, trainer.args.device
    assert isinstance(model, DistillationModel)
    # The global generators: collators and images draw from them, and the Trainer keeps them in its checkpoints.
    before = random.getstate(), np.random.get_state(), model.training  # noqa: NPY002
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # running means and the like
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    for buffer, content in buffers:
        buffer.copy_(content)
    model.zero_grad(set_to_none=True)
    model.train(before[2])
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002


def _first_batch(loader: DataLoader[Any]) -> Batch:
    batch: Batch = next(iter(loader))
    if isinstance(loader, DataLoaderStateMixin):
        loader.end()  # accelerate takes a loader that was left early for the one in use
    return batch


def _forward_and_backward(trainer: DistillationTrainer, batch: Batch) -> None:
    args, model = trainer.args, trainer.model
    assert model is not None
    if args.gradient_checkpointing:
        chosen: Any = args.gradient_checkpointing_kwargs or {}
        _checkpoint_activations(model, dict(chosen))
    batch = trainer.ready(trainer._prepare_inputs({**batch}), 0)
    model.train()
    with trainer.accelerator.autocast():
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    values = {part: outputs[part] for part in trainer.parts} | {"loss": loss}
    if trainer.accelerator.scaler is None:
        values["gradient"] = torch.nn.utils.get_total_norm(gradients)
    if bad := [name for name, value in values.items() if not torch.isfinite(value)]:
        told = ", ".join(f"{name} {values[name].item()}" for name in bad)
        spoilt = "" if all_finite(trainer.teacher.parameters()) == 1 else "; there are such weights in the teacher"
        raise NonFiniteError(f"the first batch gives NaN or infinity before any training: {told}{spoilt}")


def _checkpoint_activations(model: Any, kwargs: dict[str, Any]) -> None:
    """As the Trainer does when it begins; renamed within transformers 5, with two options of its own among them."""
    options = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    renamed = hasattr(PreTrainedModel, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable(kwargs or None, **options)


def _build_schedule(trainer: DistillationTrainer) -> None:
    """For an optimiser of nothing: a schedule changes the one that it is made for, and for some hooks itself in."""
    assert trainer.optimizer is not None
    groups = [{"params": [torch.zeros(1)]} for _ in trainer.optimizer.param_groups]
    nothing = torch.optim.SGD(groups, lr=trainer.args.learning_rate)
    steps = total_steps(trainer, trainer.args)
    schedule = trainer.create_scheduler(steps, optimizer=nothing)
    trainer.lr_scheduler, trainer._created_lr_scheduler = None, False
    for factor in getattr(schedule, "lr_lambdas", []):  # most are a function of the step, and some fail late
        for step in (0, steps // 2, steps):
            if not math.isfinite(factor(step)):
                raise UsageError(f"the learning rate is {factor(step)} times its value at step {step}")
