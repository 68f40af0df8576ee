"""Two steps of the systems that mask."""

import json
from pathlib import Path
from typing import Any

from one_step import DEFAULTS, LENGTHS, NO_DROPOUT, sequences
from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from transformers import DataCollatorWithPadding, TrainingArguments

from minilm.models.students import build_student
from minilm.objectives.masking import Masking
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import Objective
from minilm.training.trainer import DistillationTrainer

MASKED = ("mlm", "mlm-kd", "distilbert")
OPTIONS: dict[str, dict[str, Any]] = {**{name: {} for name in MASKED}, "mobilebert": {"layer_map": {1: 1, 2: 4}}}
PROBABILITY = 0.3  # so that no rank is without labels


def masked_trainer(folder: Path, system: str, batch: int, accumulation: int) -> DistillationTrainer:
    """Of twelve sequences, four of them empty: plain gradient descent."""
    tokenizer = tiny_tokenizer()
    teacher = tiny_model("bert", "ForMaskedLM", vocab_size=len(tokenizer), **NO_DROPOUT)
    student = build_student(teacher, num_layers=2, with_head=True)
    data = sequences((*LENGTHS, 4), empty=4).map(lambda row: {"input_ids": [i % 52 + 5 for i in row["input_ids"]]})
    options = {
        **DEFAULTS,
        "max_steps": 2,
        "learning_rate": 0.02,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 3,
    }
    return DistillationTrainer(
        teacher=teacher,
        student=student,
        criterion=Objective(SYSTEMS[system].terms(teacher, student, **OPTIONS[system])),
        masking=Masking(tokenizer, probability=PROBABILITY),
        args=TrainingArguments(str(folder / system), **options),
        train_dataset=data,
        eval_dataset=data.select(range(7)),  # which two ranks do not share evenly
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def two_steps(folder: Path, batch: int, accumulation: int) -> None:
    """Saves each system's student, and what was logged and evaluated."""
    for system in OPTIONS:
        run = masked_trainer(folder, system, batch, accumulation)
        run.train()
        run.save_model()
        evaluation = run.evaluate()
        if run.args.should_save:
            names = ["loss", *run.parts]
            logged = {name: [row[name] for row in run.state.log_history if name in row] for name in names}
            logged |= {f"eval_{name}": [evaluation[f"eval_{name}"]] for name in names}
            (folder / system / "log.json").write_text(json.dumps(logged))
        run.accelerator.wait_for_everyone()
    run.end()
