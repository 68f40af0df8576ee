"""MiniLM distillation as a `transformers.Trainer`.

The relation loss is the mean over the sequences of a whole optimiser step (MiniLM eq. 6 and 9 with the step's batch as
data set), over all its micro-batches and ranks: a micro-batch with n of the step's n_step sequences weighs n / n_step.
The output loss, where there is one, is the mean over the step's tokens or examples in the same way. DDP and FSDP
average the gradients of W ranks, so each share is multiplied by W.
"""

import copy
import inspect
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, ProgressCallback, TrainerState, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from minilm.data.reading import DataError
from minilm.data.sampling import EpochSampler
from minilm.data.streams import TextStream
from minilm.data.workers import WorkerDeaths, worker_faults
from minilm.errors import NonFiniteError
from minilm.models.batches import (
    FOR_THE_LOSS,
    Batch,
    as_packed,
    by_token,
    check_batch,
    count_sequences,
    count_tokens,
    model_inputs,
    relation_mask,
    relation_qkv,
    token_mask,
)
from minilm.models.capture import QKV, attention_qkv, resolve_layer
from minilm.models.heads import Output, forward_with_output, has_vocabulary_head
from minilm.models.students import freeze_unused
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.outputs import check_temperature, output_loss
from minilm.training.checkpoints import CheckpointingTrainer
from minilm.training.clock import LossClock, StepClock
from minilm.training.finite import FiniteWatch, all_finite
from minilm.training.progress import DistillationProgress
from minilm.training.runs import newest_intact
from minilm.values import find_fault

LOSS, GRADIENTS, WEIGHTS = "loss", "gradients", "weights"  # what is watched beside the parts
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DistillationModel(nn.Module):
    """The student with its loss inside, where DDP, FSDP and mixed precision see both.

    Accelerate turns what a model returns into float32, and the Trainer's `compute_loss` runs outside autocast; computed
    in here, the loss gets q, k, v in the dtype that the student computes in.

    Args:
        student: a base model; with an output loss the model with its head.
        criterion: the relations and their weights.
        output_weight: of the output loss L_OUT beside the relations; 0 leaves it out.
        output_temperature: T of the output loss T² KL(teacher logits / T ‖ student logits / T).
    """

    accepts_loss_kwargs = True  # tells the Trainer that the loss it gets is already weighted within the step

    def __init__(
        self,
        student: PreTrainedModel,
        criterion: MiniLMLoss,
        output_weight: float = 0.0,
        output_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_temperature(output_temperature)
        self.student = student
        self.criterion = criterion
        self.output_weight = output_weight
        self.output_temperature = output_temperature
        self.clock = LossClock()

    def forward(
        self, teacher_qkv: QKV, teacher_output: Output | None = None, shares: Tensor | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """{"loss", relation: its part, "output": its part}, float32 scalars; the parts are detached means of the batch.

        Args:
            teacher_qkv: q, k, v of the teacher's layer, each (B, H, N, D).
            teacher_output: with an output loss, what `forward_with_output` gave of the teacher.
            shares: (2,) how much of its step the batch is, by sequences and by what the output loss counts; None: 1.
            batch: the student's inputs, with attention_mask (B, N) where there is padding, or a packed batch.
        """
        inputs = model_inputs(self.student, batch, self.criterion.causal)
        output = None
        if teacher_output is None:
            student_qkv = attention_qkv(self.student, inputs)
        else:
            student_qkv, output = forward_with_output(self.student, inputs, -1)
        of_tokens = by_token(self.student, batch, student_qkv[0].shape[2])
        teacher_qkv, student_qkv = relation_qkv(teacher_qkv, batch), relation_qkv(student_qkv, batch)
        with self.clock.forward(student_qkv):
            loss, parts = self.criterion(teacher_qkv, student_qkv, **relation_mask(of_tokens))
        self.clock.backward(loss, student_qkv)
        if shares is not None:
            loss = loss * shares[0]
        if teacher_output is not None and output is not None:
            total, count = output_loss(output, teacher_output, self.output_temperature, token_mask(of_tokens))
            mean = total / count.clamp(min=1)
            parts["output"] = mean.detach()
            loss = loss + self.output_weight * (mean if shares is None else mean * shares[1])
        return {"loss": loss, **parts}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the student's layers in backward, non-reentrant: the other kind gives q, k, v no gradient."""
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.student.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs=kwargs, **options
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` under the name that newer Trainers call."""
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)


class DistillationTrainer(CheckpointingTrainer):
    """Trains a student on the relations of one layer of a teacher; logs and evaluates each relation beside the loss.

    Args:
        teacher: run in eval mode without gradients, in the compute dtype, up to its layer's projections and no further
            (with an output loss: up to its head's last product).
        student: trained up to its last layer's projections; what is above them is frozen and saved as it came (with an
            output loss everything is trained).
        criterion: the relations and their weights.
        teacher_layer: 1 to L or -1 to -L.
        output_weight, output_temperature: as in `DistillationModel`; both models must come with their heads.
        options: those of `transformers.Trainer`: train_dataset (also a `TextStream`), eval_dataset, processing_class,
            data_collator, ...
        greater_is_better: of `metric_for_best_model`, where that is one of these losses. It counts instead of the
            arguments' own, whose default takes every name that does not end in "loss" for better when higher.

    Logged in training beside the Trainer's own: each relation, "output", "tokens_per_second" (of images
    "images_per_second", of sound "sequences_per_second") over all processes, and, but for compiled models,
    "loss_share", the part of a step's time that the relation loss takes. Evaluation gives "eval_<relation>", the mean
    over the sequences, "eval_output", the mean over the tokens or examples, and "eval_loss", their weighted sum. What
    is saved is the student alone, as `from_pretrained` of its class, or `AutoModel`, loads it.

    A batch may be packed (`PackingCollator`) or flattened (transformers' `DataCollatorWithFlattening`).

    A loss, a gradient norm (but for fp16, whose scaler passes over such steps) or a weight that is NaN or infinite ends
    the run before anything of it is saved; see `minilm.training.finite` for when it is looked at.

    Raises:
        ValueError: a teacher layer that does not exist; training arguments that mean nothing here; several GPUs in one
            process (DataParallel); a `metric_for_best_model` that no evaluation gives; at the first batch, packed texts
            or prefixes that a model does not keep apart.
        NonFiniteError (from `train` and `evaluate`): on all ranks, names the step and what was not finite.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        criterion: MiniLMLoss,
        args: TrainingArguments,
        teacher_layer: int = -1,
        output_weight: float = 0.0,
        output_temperature: float = 1.0,
        greater_is_better: bool = False,
        **options: Any,
    ) -> None:
        check_arguments(args)
        if criterion.reduction != "sequence":
            raise ValueError(
                f"a step is the mean over its sequences: reduction must be 'sequence', not {criterion.reduction!r}"
            )
        self.teacher_layer = resolve_layer(teacher, teacher_layer)
        self._weights = criterion.relations | ({"output": output_weight} if output_weight else {})
        self.parts = list(self._weights)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter that is not frozen gets a gradient
        freeze_unused(student, criterion.relations, output=bool(output_weight))
        if options.setdefault("compute_metrics", self._means) == self._means:
            self._check_metric(args, options.get("eval_dataset"), greater_is_better)
        args.logging_nan_inf_filter = False  # it would hide what ends the run, and waits for the device to do so
        model = DistillationModel(student, criterion, output_weight, output_temperature)
        super().__init__(model=model, args=args, **options)
        _check_numbers(args)  # again: accelerator_config may have set some
        self._saved_processor = copy.deepcopy(self.processing_class)  # a tokenizer keeps how it last padded and cut
        dtype = DTYPES[self.accelerator.mixed_precision]
        self.teacher: PreTrainedModel = teacher.to(device=args.device, dtype=dtype)  # type: ignore[call-arg]
        self.teacher.eval().requires_grad_(False)
        self._output_per_token = bool(output_weight) and has_vocabulary_head(student)
        self._causal, self._with_output = criterion.causal, bool(output_weight)
        self._clock, self._step_clock, self._deaths = model.clock, StepClock(), WorkerDeaths()
        self._clock.enabled = args.logging_strategy != "no"  # else nobody would read it
        self.add_callback(self._step_clock)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(DistillationProgress)
        self._watch = self._new_watch()
        self._tried: set[str] = set()  # kinds of masks
        self._looks_at_every_step = args.device.type == "cpu"  # where that waits for nothing
        self._sums: dict[str, Tensor] = {}  # of each part, and of the tokens, since the last log
        self._sums_from = 0
        self._stream_states: dict[int, dict[str, Any]] = {}  # by reader, after the last batch taken from it

    @property
    def student(self) -> PreTrainedModel:
        """The student inside whatever wraps it."""
        student: PreTrainedModel = self.accelerator.unwrap_model(self.model).student
        return student

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As the Trainer's, but a checkpoint of the last step is only loaded: the Trainer would take one step more."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else float("inf")
            if state.global_step >= self.args.max_steps > 0 or (state.epoch or 0) >= epochs:
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint:
                    self._load_best_model()
                else:
                    self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(state.global_step, 0.0, {})
        self._watch, self._sums = self._new_watch(), {}
        try:
            with worker_faults():  # of the evaluation's
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._deaths.unwatch()

    def _new_watch(self) -> FiniteWatch:
        return FiniteWatch([*self.parts, LOSS, GRADIENTS, WEIGHTS], self.args.device)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **options: Any
    ) -> None:
        if self._sums:  # the end of an epoch calls this a second time
            values = {part: self._sums[part] for part in self.parts if part in self._sums} | {LOSS: tr_loss}
            if grad_norm is not None and self.accelerator.scaler is None:
                values[GRADIENTS] = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            self._watch.note(self.state.global_step, values)
        due = self.control
        if due.should_training_stop:
            self._stop_if_not_finite(with_weights=True)
        elif due.should_log or due.should_evaluate or due.should_save or self._looks_at_every_step:
            self._stop_if_not_finite()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_not_finite(with_weights=True)
        super()._save_checkpoint(model, trial)

    def _stop_if_not_finite(self, *, with_weights: bool = False) -> None:
        if with_weights:
            assert self.model is not None
            trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
            self._watch.note(self.state.global_step, {WEIGHTS: all_finite(trained)})
        if found := self._watch.first(self.accelerator.gather):
            step, terms = found
            raise NonFiniteError(f"{_named(terms, self.parts)} NaN or infinite at step {step}{self._what_is_left()}")

    def _what_is_left(self) -> str:
        intact, _ = newest_intact(Path(str(self.args.output_dir)))
        left = f"the newest intact checkpoint is {intact}" if intact else "there is no checkpoint"
        return f" (learning_rate is {self.args.learning_rate:g}): the run has ended there, and {left}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; raises `NonFiniteError` where a loss is not finite, after it was logged."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        bad = [part for part in (*self.parts, LOSS) if not math.isfinite(metrics.get(f"{prefix}_{part}", 0))]
        if bad:
            step = self.state.global_step
            raise NonFiniteError(
                f"held-out: {_named(bad, self.parts)} NaN or infinite at step {step}{self._what_is_left()}"
            )
        return metrics

    def _check_metric(self, args: TrainingArguments, heldout: Any, greater_is_better: bool) -> None:
        """Whether the evaluation gives the metric by which checkpoints are compared, and which of two is better."""
        if args.metric_for_best_model is None:
            return
        sets = [f"{name}_" for name in heldout] if isinstance(heldout, dict) else [""]
        losses = [f"{name}{part}" for name in sets for part in (LOSS, *self.parts)]
        if args.metric_for_best_model.removeprefix("eval_") not in losses:
            raise ValueError(
                f"metric_for_best_model is {args.metric_for_best_model!r}: it must be one of {', '.join(losses)}"
            )
        args.greater_is_better = greater_is_better

    def end(self) -> None:
        """Closes trackers and the process group, on all ranks at once; nothing can be trained afterwards."""
        self.accelerator.wait_for_everyone()
        # DDP's wrapper holds the group: gloo aborts a process that still does when the interpreter ends.
        self.model_wrapped = self.student
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and how many sequences and outputs it has on all ranks, (2,) float32.

        The Trainer would count labels. What one rank cannot read ends the run on all of them, by `DataError` after a
        checkpoint of the last whole step.
        """
        self._step_clock.start()
        self._deaths.watch()
        batches: list[Any] = []
        fault: DataError | None = None
        try:
            self._deaths.check()
            with worker_faults():
                batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        except DataError as error:
            fault = error
        states = [state for batch in batches if (state := batch.pop("stream_state", None))]
        batches = [self._checked(batch) for batch in batches]
        counts = torch.zeros(4, device=device)  # the last: of the ranks that cannot go on
        counts[3] = float(fault is not None)
        for batch in batches:
            counts[:3] += torch.stack([*self._counts(batch), count_tokens(batch)]).to(device)
        counts = self.accelerator.reduce(counts, "sum")
        if fault or (self.args.world_size > 1 and counts[3]):
            self.stop_after_saving(fault or DataError("another process could not read its data"))
        self._stream_states |= {state["reader"]: state for state in states}
        self._add({"sequences": counts[0], "tokens": counts[2]})
        return batches, counts[:2]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's mean, or in training its share of the means over the step's `num_items_in_batch`."""
        with torch.no_grad():
            teacher = self._teacher_targets(inputs)
        if num_items_in_batch is None:
            outputs = model(**teacher, **inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        # A step with no token at all has loss 0.
        of_step = torch.as_tensor(num_items_in_batch).clamp(min=1)
        shares = torch.stack(self._counts(inputs)) / of_step * self.accelerator.num_processes
        outputs = model(**teacher, shares=shares, **inputs)
        self._add({part: outputs[part] * shares[int(part == "output")] for part in self.parts})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _checked(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as it goes on, of its kind the first tried on both models (a student in shards is not tried)."""
        batch = as_packed(batch)
        kind = next((name for name in ("sequence_ids", "prefix_lengths") if name in batch), None)
        if kind and kind not in self._tried:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            for model in (self.teacher,) if sharded else (self.teacher, self.student):
                check_batch(model, kind, self._causal)
            if kind == "sequence_ids" and self._with_output and not self._output_per_token:
                raise ValueError(f"{type(self.student).__name__} classifies whole rows: its texts cannot be packed")
            self._tried.add(kind)
        return batch

    def _teacher_targets(self, batch: Batch) -> dict[str, Any]:
        inputs = model_inputs(self.teacher, batch, self._causal)
        if not self._with_output:
            return {"teacher_qkv": attention_qkv(self.teacher, inputs, self.teacher_layer)}
        qkv, output = forward_with_output(self.teacher, inputs, self.teacher_layer)
        return {"teacher_qkv": qkv, "teacher_output": output}

    def _counts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sequences, and what the output loss is the mean of: tokens, or all examples."""
        sequences = count_sequences(batch)
        if self._output_per_token:
            return sequences, count_tokens(batch)
        return sequences, torch.full_like(sequences, len(next(iter(batch.values()))))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, the batch's mean of each part (B, parts), their weights (B, parts)), as `_means` expects them."""
        inputs = self._checked(self._prepare_inputs(inputs))
        rows = len(next(iter(inputs.values())))
        if "sequence_ids" in inputs and rows == 1 < self.args.per_device_eval_batch_size and self.args.world_size > 1:
            raise ValueError(
                f"flattened texts cannot be shared out evenly to {self.args.world_size} processes: evaluate with a "
                "collator that pads, or with per_device_eval_batch_size 1"
            )
        own = max(1, self._rows_not_repeated(rows))
        if own < rows:
            inputs = {name: tensor[:own] for name, tensor in inputs.items()}
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        counts = self._counts(inputs)
        means = torch.stack([outputs[part] for part in self.parts])
        weights = torch.stack([counts[part == "output"] for part in self.parts]) / own
        return loss, means.expand(rows, -1), weights.expand(rows, -1)

    def _rows_not_repeated(self, rows: int) -> int:
        """Of a batch's rows those that accelerate will keep: it fills the ranks' last batches up with first rows."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        kept: int = state.remainder - rows * self.args.process_index
        return min(rows, max(0, kept))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's, whose loss weighs rows alike: here it is the weighted sum of the parts."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix, metrics = kwargs.get("metric_key_prefix", "eval"), output.metrics or {}
        if all(f"{prefix}_{part}" in metrics for part in self.parts):
            metrics[f"{prefix}_loss"] = sum(w * metrics[f"{prefix}_{part}"] for part, w in self._weights.items())
        return output

    def _means(self, prediction: EvalPrediction) -> dict[str, float]:
        means, weights = (np.asarray(x) for x in (prediction.predictions, prediction.label_ids))
        return dict(zip(self.parts, ((means * weights).sum(0) / weights.sum(0)).tolist(), strict=True))

    def _add(self, values: dict[str, Tensor]) -> None:
        if not self._sums:
            self._sums_from = self.state.global_step
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean of each part since the last log, and the pace."""
        if "loss" in logs and self._sums:
            steps, seconds = self.state.global_step - self._sums_from, self._step_clock.seconds()
            means = self.accelerator.reduce(torch.stack([self._sums[part] for part in self.parts]) / steps, "mean")
            logs.update(zip(self.parts, means.tolist(), strict=True))
            if seconds:
                images = self.student.main_input_name == "pixel_values"
                unit = "tokens" if self._sums["tokens"] else "images" if images else "sequences"
                count = self._sums["tokens" if unit == "tokens" else "sequences"]
                logs[f"{unit}_per_second"] = round(count.item() / seconds, 1)
                if of_loss := self._clock.seconds():
                    logs["loss_share"] = round(of_loss / seconds, 4)
            self._sums = {}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Of map-style data: seeded by seed and epoch alone, so that a resumed run draws what it would have drawn."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        grouped = getattr(self.args, "group_by_length", False)  # until it was renamed within transformers 5
        strategy = getattr(self.args, "train_sampling_strategy", "group_by_length" if grouped else "random")
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = _lengths(dataset) if strategy == "group_by_length" else None
        together = self.args.train_batch_size * self.args.world_size
        return EpochSampler(len(dataset), seed=seed, lengths=lengths, batch_size=together)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of a stream its own: accelerate's would have every process read everything."""
        if isinstance(self.train_dataset, TextStream):
            return self.train_dataset.loader(pin_memory=self.args.dataloader_pin_memory)
        return super().get_train_dataloader()

    def rank_state(self) -> dict[str, Any]:
        """Where this process's stream stands: the state of each reader after the last batch taken from it."""
        return {"stream": list(self._stream_states.values())} if self._stream_states else {}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """Takes back what `rank_state` gave."""
        if not isinstance(self.train_dataset, TextStream):
            raise ValueError("the checkpoint is of a run on a stream, and the data of this run are none")
        self._stream_states = {reader["reader"]: reader for reader in state["stream"]}
        self.train_dataset.load_state(state["stream"])

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer asks the wrapper's forward, whose inputs are the student's.
        if self._signature_columns is None:
            parameters = inspect.signature(self.student.forward).parameters
            self._signature_columns = [*parameters, *FOR_THE_LOSS, "lengths"]  # type: ignore[assignment]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        if state_dict is not None:  # gathered from shards, under the wrapper's names
            state_dict = {name.removeprefix("student."): tensor for name, tensor in state_dict.items()}
        self.student.save_pretrained(folder, state_dict=state_dict)
        if self._saved_processor is not None:
            self._saved_processor.save_pretrained(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None when pushing to the hub: the Trainer's would replace the one that the report writes."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # shards of the wrapper
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            # Through the class, which undoes what saving may have renamed. Every tensor of the student must be there.
            saved = type(self.student).from_pretrained(resume_from_checkpoint).state_dict()
            self.student.load_state_dict({name: saved[name] for name in self.student.state_dict()})

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _named(terms: list[str], parts: list[str]) -> str:
    """The terms with their verb: the losses, or where these are finite what came of them."""
    losses = [term for term in terms if term in parts]
    if losses or LOSS in terms:
        return f"the loss ({', '.join(losses)}) is" if losses else "the loss is"
    return "the norm of the gradients is" if GRADIENTS in terms else "weights of the student are"


@lru_cache(maxsize=1)  # the trial before training asks too
def _lengths(dataset: Any) -> list[int]:
    """Tokens of every row, read from the table without decoding rows one by one."""
    return [len(ids) for ids in dataset.with_format(None)["input_ids"]]


def _check_numbers(args: TrainingArguments) -> None:
    if fault := find_fault(vars(args), [type(args)]):
        raise ValueError(f"{fault.name} {fault.must}, got {fault.value}")


def check_arguments(args: TrainingArguments) -> None:
    """Raises `ValueError` for training arguments that mean nothing here."""
    _check_numbers(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start one process each (torchrun "
            f"--nproc_per_node {args.n_gpu} -m minilm.cli ...), or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and args.distributed_state.distributed_type is DistributedType.NO:
        raise ValueError(f"{processes} processes were started, but each would train alone: without a GPU add --use_cpu")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs} and max_steps {args.max_steps}: no step to train"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} means nothing here: there are no labels"
        )
    if args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} is not supported: only the student's input would get noise"
        )
    if isinstance(options := args.gradient_checkpointing_kwargs, dict) and options.get("use_reentrant"):
        raise ValueError("use_reentrant=True is not supported: reentrant checkpointing gives q, k and v no gradient")
    if not args.eval_do_concat_batches:
        raise ValueError("eval_do_concat_batches=False is not supported: losses are averaged over all batches")
    if args.eval_strategy == "no" and (args.load_best_model_at_end or args.save_strategy == "best"):
        wanted = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy='best'"
        raise ValueError(f"{wanted} needs eval_strategy 'steps' or 'epoch': without evaluations there is no best")
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        raise ValueError("debug='underflow_overflow' is not supported; a loss that is NaN or infinite ends the run")
    if args.label_names is not None:
        raise ValueError(f"label_names={args.label_names} means nothing here: there are no labels")
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel=True is not supported: it changes models that stand alone, not the student")
    for reporter in get_reporting_integration_callbacks(args.report_to):  # type: ignore[no-untyped-call]
        try:
            reporter()
        except RuntimeError as missing:  # the package that it reports to
            raise ValueError(f"report_to={args.report_to}: {missing}") from None
