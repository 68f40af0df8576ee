"""Trainers for tests on a handful of random sequences, and one step of them."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from tiny_models import VOCABULARY, tiny_model
from tiny_text import tiny_tokenizer
from transformers import DataCollatorWithPadding, PreTrainedModel, TrainingArguments

from minilm import MiniLMLoss
from minilm.models.students import build_student
from minilm.objectives.term import Objective
from minilm.training.trainer import DistillationTrainer

LENGTHS = (5, 9, 2, 7, 12, 3, 6)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DEFAULTS = {
    "max_steps": 1,
    "per_device_train_batch_size": len(LENGTHS),
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
}
WITH_PARAMETERS = {"learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1}  # of a term: a checkpoint has them


def sequences(lengths: tuple[int, ...] = LENGTHS, empty: int = 0) -> datasets.Dataset:
    """Random tokens, `empty` sequences that are all padding, and a column that no model takes."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    masks = [[1] * length for length in lengths]
    rows, masks = rows + [[5, 6, 7, 8]] * empty, masks + [[0] * 4] * empty
    return datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": masks, "note": ["no input"] * len(rows)})


def trainer(
    folder: Path,
    *,
    teacher: PreTrainedModel | None = None,
    criterion: MiniLMLoss | Objective | None = None,
    train_dataset: Any = None,
    own: dict[str, Any] | None = None,
    **options: Any,
) -> DistillationTrainer:
    """By default plain gradient descent without clipping or decay: a step's weights tell its gradient.

    `own` goes to the Trainer, `options` to its arguments.
    """
    teacher = teacher or tiny_model("bert")
    return DistillationTrainer(
        teacher=teacher,
        student=build_student(teacher, num_layers=2, init="random", seed=3),
        criterion=criterion or MiniLMLoss(),
        args=TrainingArguments(str(folder), **{**DEFAULTS, **options}),
        train_dataset=train_dataset or sequences(),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
        **(own or {}),
    )


def take_step(folder: Path, batch: int, accumulation: int, **options: Any) -> DistillationTrainer:
    """Twelve sequences in one step, four of them empty; saves the student, what was logged and an evaluation."""
    run = trainer(
        folder,
        teacher=tiny_model("bert", **NO_DROPOUT),
        train_dataset=sequences((*LENGTHS, 4), empty=4),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=3,
        **options,
    )
    run.train()
    run.save_model()
    evaluation = run.evaluate(sequences())  # of seven, which two ranks do not share evenly
    if run.args.should_save:
        logged = {name: run.state.log_history[0][name] for name in ("loss", *run.parts)}
        logged |= {f"eval_{name}": evaluation[f"eval_{name}"] for name in ("loss", *run.parts)}
        (folder / "log.json").write_text(json.dumps(logged))
    return run


def one_step(folder: Path, batch: int, accumulation: int) -> None:
    take_step(folder, batch, accumulation).end()
