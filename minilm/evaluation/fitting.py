"""Fine-tuning and predicting by `transformers.Trainer`, for every kind of head."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from minilm.errors import NonFiniteError
from minilm.evaluation.settings import Settings

WARMUP, WEIGHT_DECAY = 0.1, 0.01  # of the papers


def fit(
    model: PreTrainedModel,
    records: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    settings: Settings,
    folder: Path,
    name: str,
    keep: Callable[[Any], Any],
) -> Trainer:
    """Fine-tunes `model` and returns the trainer, for `predict`; its weights are those after the last step.

    One process and one device; nothing is saved.

    Args:
        records: tokenized, with "labels" or what else the model computes its loss from.
        folder: the Trainer's; it is made and stays empty.
        name: what the progress bar and errors call it.
        keep: what is kept of a batch's logits in `predict`, a tuple where the model returns more than these.

    Raises:
        NonFiniteError: the loss or the weights became NaN or infinite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=128,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        weight_decay=WEIGHT_DECAY,
        seed=settings.seed,
        bf16=settings.bf16,
        # transformers refuses bf16 on a machine that has a CPU alone, unless it is said.
        use_cpu=settings.use_cpu or not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available() and not settings.use_cpu,
        logging_steps=20,
        logging_nan_inf_filter=False,  # which would hide them
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the batch would grow by the number of GPUs
    trainer = Trainer(
        model,
        arguments,
        collate,
        train_dataset=records,
        callbacks=[_Bars(name), _StopAtNaN(name)],
        preprocess_logits_for_metrics=lambda logits, _: keep(logits),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if not all(
        bool(weights.isfinite().all()) for weights in model.parameters()
    ):  # those of the last step are in no loss
        raise NonFiniteError(f"{name}: weights are NaN or infinite at the end, learning rate {settings.learning_rate}")
    return trainer


def predict(trainer: Trainer, records: Dataset) -> Any:
    """What is kept of the logits, an array or a tuple of them, for the records in their order.

    It is computed in batches of like lengths, the longest first, so that little is padded; arrays of unlike lengths
    are padded with -100.
    """
    order = np.argsort([-len(tokens) for tokens in records["input_ids"]], kind="stable")
    place = np.argsort(order)
    kept = trainer.predict(records.select(order)).predictions
    return tuple(each[place] for each in kept) if isinstance(kept, tuple) else kept[place]


class _Bars(TrainerCallback):
    """A bar for the steps, then one for what is predicted; each goes when it is full, so that of all runs stays."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc=self._name, unit=" steps", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
        self._bar = None

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._bar is None:
            self._bar = tqdm(total=len(eval_dataloader), desc=f"{self._name}, scoring", unit=" batches", leave=False)
        self._bar.update()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._bar.close()
        self._bar = None


class _StopAtNaN(TrainerCallback):
    def __init__(self, name: str) -> None:
        self._name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for key in ("loss", "train_loss"):
            if logs and not math.isfinite(loss := logs.get(key, 0.0)):
                raise NonFiniteError(
                    f"{self._name}: the loss is {loss} by step {state.global_step}, learning rate {args.learning_rate}"
                )
