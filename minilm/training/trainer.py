"""MiniLM distillation as a `transformers.Trainer`.

Each term of the objective is the mean over its units (sequences, tokens, examples) of a whole optimiser step, over all
its micro-batches and ranks (`minilm.objectives.term`). For MiniLM (eq. 6 and 9) the step's batch is the data set.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, ProgressCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from minilm.data.faults import DataError
from minilm.data.workers import WorkerDeaths, worker_faults
from minilm.errors import NonFiniteError, UsageError
from minilm.models.batches import Batch, as_packed, check_batch, count_sequences, count_tokens, model_inputs
from minilm.models.observe import Observed, observe, resolve_needs
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.masking import HELD_OUT, Masking
from minilm.objectives.term import COUNTS, LOSS, Objective, Unit
from minilm.training.arguments import check_arguments, check_numbers
from minilm.training.clock import StepClock, plausible
from minilm.training.finite import GRADIENTS, WEIGHTS, FiniteWatch, all_finite, named_terms
from minilm.training.model import DistillationModel, as_objective
from minilm.training.progress import DistillationProgress
from minilm.training.rates import RatesTrainer
from minilm.training.runs import what_is_intact

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DistillationTrainer(RatesTrainer):
    """Trains a student on an objective; logs and evaluates each of its parts beside the loss.

    Args:
        teacher: run in eval mode without gradients, in the compute dtype, and no further than the objective needs.
        student: what the objective does not reach is frozen, and saved as it came: of relations alone what lies above
            the last layer's projections.
        criterion: the objective; or the relations of the student's last layer and their weights.
        teacher_layer: with such relations, 1 to L or -1 to -L.
        output_weight, output_temperature: with such relations, as in `DistillationModel`; both models must come with
            their heads.
        options: those of `transformers.Trainer`: train_dataset (also a `TextStream`), eval_dataset, processing_class,
            data_collator, ...; and `learning_rate_factors`, which see in `minilm.training.rates`.
        masking: of tokens, for objectives that predict them.
        greater_is_better: of `metric_for_best_model`, where that is one of these losses. It counts instead of the
            arguments' own, whose default takes every name that does not end in "loss" for better when higher.

    Attributes:
        parts: the names of the objective's parts.
        teacher_layer: the highest layer of the teacher whose q, k, v are taken, from 1; 0 if there is none.

    Logged in training beside the Trainer's own: each part, "tokens_per_second" (of images "images_per_second", of sound
    "sequences_per_second") over all processes. Evaluation gives "eval_<part>", the mean over the part's units, and
    "eval_loss", their weighted sum. What is saved is the student alone, as `from_pretrained` of its class, or
    `AutoModel`, loads it; parameters of terms are trained, and saved in checkpoints only.

    Batches may be packed (`PackingCollator`) or flattened (transformers' `DataCollatorWithFlattening`).
    A loss, a gradient norm (but for fp16, whose scaler passes over such steps) or a weight that is NaN or infinite ends
    the run before anything of it is saved; see `minilm.training.finite` for when it is looked at.

    Raises:
        ValueError: a layer that does not exist; training arguments that mean nothing here; several GPUs in one process
            (DataParallel); a `metric_for_best_model` that no evaluation gives; models on which the objective cannot be
            computed; at the first batch, packed texts or prefixes that a model does not keep apart.
        NonFiniteError (from `train` and `evaluate`): on all ranks, names the step and what was not finite.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        criterion: MiniLMLoss | Objective,
        args: TrainingArguments,
        teacher_layer: int = -1,
        output_weight: float = 0.0,
        output_temperature: float = 1.0,
        masking: Masking | None = None,
        greater_is_better: bool = False,
        **options: Any,
    ) -> None:
        check_arguments(args)
        objective = as_objective(criterion, student, teacher_layer, output_weight, output_temperature)
        self.teacher_layer = max(resolve_needs(teacher, objective.teacher).qkv, default=0)
        self._masking, self._weights, self._unit_of = masking, objective.parts, objective.units
        self.parts = list(self._weights)
        self._units: list[Unit] = list(dict.fromkeys(self._unit_of.values()))
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter that is not frozen gets a gradient
        if options.setdefault("compute_metrics", self._means) == self._means:
            self._check_metric(args, options.get("eval_dataset"), greater_is_better)
        args.logging_nan_inf_filter = False  # it would hide what ends the run, and waits for the device to do so
        model = DistillationModel(student, objective)
        super().__init__(model=model, args=args, **options)
        check_numbers(args)  # again: accelerator_config may have set some
        dtype = DTYPES[self.accelerator.mixed_precision]
        self.teacher: PreTrainedModel = teacher.to(device=args.device, dtype=dtype)  # type: ignore[call-arg]
        self.teacher.eval().requires_grad_(False)
        with self.accelerator.autocast():
            objective.freeze_unused(self.teacher, model.to(args.device).student)
        self._clock, self._deaths = StepClock(), WorkerDeaths()
        self.add_callback(self._clock)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(DistillationProgress(self.parts))
        self._watch = self._new_watch()
        self._tried: set[str] = set()  # layouts of batches
        self._looks_at_every_step = args.device.type == "cpu"  # where that waits for nothing
        self._sums: dict[str, Tensor] = {}  # of each part, since the last log
        self._seen = torch.zeros(2, device=args.device)  # sequences and tokens, since the last log
        self._sums_from = 0

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As the Trainer's, but a checkpoint of the last step is only loaded: the Trainer would take one step more."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else float("inf")
            if state.global_step >= self.args.max_steps > 0 or (state.epoch or 0) >= epochs:
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint:
                    self._load_best_model()
                else:
                    self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(state.global_step, 0.0, {})
        self._watch = self._new_watch()
        self._reset_sums()
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
            step, bad = found
            raise NonFiniteError(f"{named_terms(bad, self.parts)} NaN or infinite at step {step}{self._what_is_left()}")

    def _what_is_left(self) -> str:
        left = what_is_intact(Path(str(self.args.output_dir)))
        return f" (learning_rate is {self.args.learning_rate:g}): the run has ended there, and {left}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; raises `NonFiniteError` where a loss is not finite, after it was logged."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        bad = [part for part in (*self.parts, LOSS) if not math.isfinite(metrics.get(f"{prefix}_{part}", 0))]
        if bad:
            step = self.state.global_step
            raise NonFiniteError(
                f"held-out: {named_terms(bad, self.parts)} NaN or infinite at step {step}{self._what_is_left()}"
            )
        return metrics

    def _check_metric(self, args: TrainingArguments, heldout: Any, greater_is_better: bool) -> None:
        """Whether the evaluation gives the metric by which checkpoints are compared, and which of two is better."""
        if args.metric_for_best_model is None:
            return
        sets = [f"{name}_" for name in heldout] if isinstance(heldout, dict) else [""]
        losses = [f"{name}{part}" for name in sets for part in (LOSS, *self.parts)]
        if args.metric_for_best_model.removeprefix("eval_") not in losses:
            raise UsageError(
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
        """The micro-batches of a step, and how many of each unit it has on all ranks, (units,) float32.

        The Trainer would count labels. What one rank cannot read ends the run on all of them, by `DataError` after a
        checkpoint of the last whole step.
        """
        self._clock.start()
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
        batches = [self.ready(batch, self.state.global_step) for batch in batches]
        counts = torch.zeros(len(self._units) + 3, device=device)
        counts[-1] = float(fault is not None)  # of the ranks that cannot go on
        for batch in batches:
            seen = count_sequences(batch), count_tokens(batch)
            counts[:-1] += torch.stack([*self._counts(batch), *seen]).to(device)
        counts = self.accelerator.reduce(counts, "sum")
        if fault or (self.args.world_size > 1 and counts[-1]):
            self.stop_after_saving(fault or DataError("another process could not read its data"))
        self.note_stream_states(states)
        if not self._sums:
            self._sums_from = self.state.global_step
        self._seen += counts[-3:-1]
        return batches, counts[:-3]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's mean, or in training its share of the means over the step's `num_items_in_batch`."""
        with torch.no_grad():
            teacher = self._observe_teacher(inputs)
        if num_items_in_batch is None:
            outputs = model(teacher, **inputs)
            return (outputs[LOSS], outputs) if return_outputs else outputs[LOSS]
        # A step with no token at all has loss 0.
        of_step = torch.as_tensor(num_items_in_batch).clamp(min=1)
        of_all = torch.stack(self._counts(inputs)) / of_step * self.accelerator.num_processes
        shares = dict(zip(self._units, of_all, strict=True))
        outputs = model(teacher, shares=shares, **inputs)
        for part, unit in self._unit_of.items():
            self._sums[part] = self._sums.get(part, 0) + outputs[part] * shares[unit]
        return (outputs[LOSS], outputs) if return_outputs else outputs[LOSS]

    def ready(self, batch: Batch, step: int) -> dict[str, Any]:
        """As `compute_loss` takes it, masked for this step; the first of a layout is tried on models not in shards."""
        batch = as_packed(batch)
        if self._masking is not None:
            batch = self._masking(batch, step)
        layout = next((name for name in ("sequence_ids", "prefix_lengths") if name in batch), None)
        if layout and layout not in self._tried:
            in_shards = self.is_fsdp_enabled or self.is_deepspeed_enabled
            for model in (self.teacher,) if in_shards else (self.teacher, self.student):
                check_batch(model, layout, self.terms.causal)
            if layout == "sequence_ids" and "examples" in self._units:
                raise UsageError(f"{type(self.student).__name__} classifies whole rows: its texts cannot be packed")
            self._tried.add(layout)
        return batch

    def _observe_teacher(self, batch: Batch) -> Observed:
        return observe(self.teacher, model_inputs(self.teacher, batch, self.terms.causal), self.terms.teacher)

    def _counts(self, batch: Batch) -> list[Tensor]:
        return [COUNTS[unit](batch) for unit in self._units]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, the batch's mean of each part (B, parts), their weights (B, parts)), as `_means` expects them."""
        inputs = self.ready(self._prepare_inputs(inputs), HELD_OUT)
        rows = len(next(iter(inputs.values())))
        if "sequence_ids" in inputs and rows == 1 < self.args.per_device_eval_batch_size and self.args.world_size > 1:
            raise UsageError(
                f"flattened texts cannot be shared out evenly to {self.args.world_size} processes: evaluate with a "
                "collator that pads, or with per_device_eval_batch_size 1"
            )
        own = max(1, self._rows_not_repeated(rows))
        if own < rows:
            inputs = {name: tensor[:own] for name, tensor in inputs.items()}
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        counts = dict(zip(self._units, self._counts(inputs), strict=True))
        means = torch.stack([outputs[part] for part in self.parts])
        weights = torch.stack([counts[unit] for unit in self._unit_of.values()]) / own
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
        if not weights.sum(0).all():
            raise DataError(f"the held-out texts, {len(weights)}, are too few: a loss is the mean over nothing in them")
        return dict(zip(self.parts, ((means * weights).sum(0) / weights.sum(0)).tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean of each part since the last log, and the pace."""
        if "loss" in logs and self._sums:
            steps, seconds = self.state.global_step - self._sums_from, self._clock.seconds()
            means = self.accelerator.reduce(torch.stack([self._sums[part] for part in self.parts]) / steps, "mean")
            logs.update(zip(self.parts, means.tolist(), strict=True))
            if seconds:
                sequences, tokens = self._seen.tolist()
                images = self.student.main_input_name == "pixel_values"
                unit = "tokens" if tokens else "images" if images else "sequences"
                logs[f"{unit}_per_second"] = round((tokens or sequences) / seconds, 1)
            self._reset_sums()
        super().log(plausible(logs), start_time)

    def _reset_sums(self) -> None:
        self._sums = {}
        self._seen.zero_()
