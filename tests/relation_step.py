"""One step of Sentence Transformers' Trainer with the relation loss."""

import json
from pathlib import Path
from typing import Any

import datasets
from one_step import DEFAULTS, NO_DROPOUT
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from tiny_text import lines, save_teacher

from minilm import RelationLoss


def one_step(folder: Path, batch: int, accumulation: int) -> None:
    """Twelve pairs of texts in one step; saves the student as it was and is, and what was logged."""
    options: dict[str, Any] = {**DEFAULTS, "learning_rate": 0.1, "per_device_train_batch_size": batch}
    args = SentenceTransformerTrainingArguments(str(folder), gradient_accumulation_steps=accumulation, **options)
    with args.main_process_first():
        if args.should_save:
            save_teacher(folder / "teacher")
            save_teacher(folder / "start", num_hidden_layers=2, seed=5, **NO_DROPOUT)
        teacher, student = (SentenceTransformer(str(folder / name), device="cpu") for name in ("teacher", "start"))
    run = SentenceTransformerTrainer(
        student,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"anchor": lines(12), "positive": lines(12, seed=1)}),
        loss=RelationLoss(student, teacher),
    )
    run.train()
    run.save_model()
    if run.args.should_save:
        (folder / "log.json").write_text(json.dumps(run.state.log_history[0]["loss"]))
    run.accelerator.end_training()
