"""MiniLM distillation as a `transformers.Trainer`.

The loss is the mean over the sequences of a whole optimiser step (MiniLM eq. 6 and 9 with the step's batch as data
set), over all its micro-batches and ranks: a micro-batch with n of the step's n_step sequences weighs n / n_step. DDP
and FSDP average the gradients of W ranks, so each share is multiplied by W.
"""

import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from minilm._capture import QKV, attention_qkv, resolve_layer
from minilm.loss import MiniLMLoss
from minilm.students import freeze_unused

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DistillationModel(nn.Module):
    """The student with its loss inside, where DDP, FSDP and mixed precision see both.

    Accelerate turns what a model returns into float32, and the Trainer's `compute_loss` runs outside autocast; computed
    in here, the loss gets q, k, v in the dtype that the student computes in.
    """

    accepts_loss_kwargs = True  # tells the Trainer that the loss it gets is already weighted within the step

    def __init__(self, student: PreTrainedModel, criterion: MiniLMLoss) -> None:
        super().__init__()
        self.student = student
        self.criterion = criterion

    def forward(self, teacher_qkv: QKV, **inputs: Tensor) -> dict[str, Tensor]:
        """{"loss": mean over the batch's sequences, relation: its part, detached}, float32 scalars.

        Args:
            teacher_qkv: q, k, v of the teacher's layer, each (B, H, N, D).
            inputs: the student's inputs, with attention_mask (B, N) where there is padding.
        """
        student_qkv = attention_qkv(self.student, inputs)
        loss, parts = self.criterion(teacher_qkv, student_qkv, attention_mask=inputs.get("attention_mask"))
        return {"loss": loss, **parts}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the student's layers in backward, non-reentrant: the other kind gives q, k, v no gradient."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.student.gradient_checkpointing_enable(options)  # type: ignore[no-untyped-call]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` under the name that newer Trainers call."""
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)


class DistillationTrainer(Trainer):
    """Trains a student on the relations of one layer of a teacher; logs and evaluates each relation beside the loss.

    Args:
        teacher: run in eval mode without gradients, in the compute dtype, up to its layer's projections and no further.
        student: trained up to its last layer's projections; what is above them is frozen and saved as it came.
        criterion: the relations and their weights.
        teacher_layer: 1 to L or -1 to -L.
        options: those of `transformers.Trainer`: train_dataset, eval_dataset, processing_class, data_collator, ...

    Evaluation gives "eval_loss" and "eval_<relation>", the unweighted mean over the sequences. What is saved is the
    student alone, as `AutoModel.from_pretrained` loads it.

    Raises:
        ValueError: a teacher layer that does not exist; training arguments that mean nothing here; several GPUs in one
            process (DataParallel).
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        criterion: MiniLMLoss,
        args: TrainingArguments,
        teacher_layer: int = -1,
        **options: Any,
    ) -> None:
        _check_arguments(args)
        self.teacher_layer = resolve_layer(teacher, teacher_layer)
        self.relations = list(criterion.relations)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter that is not frozen gets a gradient
        freeze_unused(student, self.relations)
        options.setdefault("compute_metrics", self._relation_means)
        super().__init__(model=DistillationModel(student, criterion), args=args, **options)
        dtype = DTYPES[self.accelerator.mixed_precision]
        self.teacher: PreTrainedModel = teacher.to(device=args.device, dtype=dtype)  # type: ignore[call-arg]
        self.teacher.eval().requires_grad_(False)
        self._sums: dict[str, Tensor] = {}  # of each relation since the last log
        self._sums_from = 0

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
            if state.global_step >= self.args.max_steps > 0:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and how many sequences it has on all ranks (the Trainer would count labels)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.zeros((), device=device)
        for batch in batches:
            count += _has_tokens(batch).sum().to(device)
        return batches, self.accelerator.reduce(count, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's mean, or in training its share of the mean over the step's `num_items_in_batch` sequences."""
        with torch.no_grad():
            teacher_qkv = attention_qkv(self.teacher, inputs, self.teacher_layer)
        outputs = model(teacher_qkv=teacher_qkv, **inputs)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            sequences = torch.as_tensor(num_items_in_batch).clamp(min=1)  # a step with no token at all has loss 0
            share = _has_tokens(inputs).sum() / sequences * self.accelerator.num_processes
            loss = loss * share
            self._add_parts({relation: outputs[relation] * share for relation in self.relations})
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, each relation's mean (B, R), whether a sequence counts (B,)), as `_relation_means` expects them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        counted = _has_tokens(inputs).float()
        parts = torch.stack([outputs[relation] for relation in self.relations])
        return loss, parts.expand(len(counted), -1), counted

    def _relation_means(self, prediction: EvalPrediction) -> dict[str, float]:
        means = (prediction.predictions * prediction.label_ids[:, None]).sum(0) / prediction.label_ids.sum()  # type: ignore
        return dict(zip(self.relations, means.tolist(), strict=True))

    def _add_parts(self, parts: dict[str, Tensor]) -> None:
        if not self._sums:
            self._sums_from = self.state.global_step
        for relation, part in parts.items():
            self._sums[relation] = self._sums.get(relation, 0) + part

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean of each relation since the last log beside the training loss."""
        if "loss" in logs and self._sums:
            steps = self.state.global_step - self._sums_from
            means = self.accelerator.reduce(torch.stack(list(self._sums.values())) / steps, "mean")
            logs.update(zip(self._sums, means.tolist(), strict=True))
            self._sums = {}
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer asks the wrapper's forward, whose inputs are the student's.
        if self._signature_columns is None:
            parameters = inspect.signature(self.student.forward).parameters
            self._signature_columns = list(parameters)  # type: ignore[assignment]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        if state_dict is not None:  # gathered from shards, under the wrapper's names
            state_dict = {name.removeprefix("student."): tensor for name, tensor in state_dict.items()}
        self.student.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

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


def _has_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """(B,) bool: the sequences that count, all of them where nothing is masked."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool().any(dim=1)
    first = next(iter(inputs.values()))
    return torch.ones(len(first), dtype=torch.bool, device=first.device)


def _check_arguments(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start one process each (torchrun "
            f"--nproc_per_node {args.n_gpu} -m minilm.cli ...), or show it one GPU with CUDA_VISIBLE_DEVICES=0"
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
