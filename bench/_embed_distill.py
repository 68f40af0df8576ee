#!/usr/bin/env python3
"""Sentence Transformers' own recipe for a smaller encoder, to compare with: `EmbedDistillLoss` on given texts.

    python bench/_embed_distill.py TEACHER TEXTS OUTPUT LAYERS DISTANCE STEPS SEED

The student is the teacher with these of its layers ("2,4,6"), its labels are the teacher's own vectors of each text.
"""

import sys
from typing import Any

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

BATCH, MAX_LENGTH = 32, 64


def main(teacher_name: str, data: str, output: str, layers: str, distance: Any, steps: int, seed: int) -> None:
    """Saves the student."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, student = (SentenceTransformer(teacher_name, device=device) for _ in range(2))
    teacher.max_seq_length = student.max_seq_length = MAX_LENGTH
    bert: Any = student[0].auto_model
    bert.encoder.layer = torch.nn.ModuleList(bert.encoder.layer[int(layer) - 1] for layer in layers.split(","))
    bert.config.num_hidden_layers = len(bert.encoder.layer)
    texts = load_dataset("parquet", data_files=data, split="train").shuffle(seed=seed)
    texts = list(texts.select(range(min(len(texts), BATCH * steps)))["text"])
    vectors = teacher.encode(texts, batch_size=2 * BATCH, show_progress_bar=False)
    arguments = SentenceTransformerTrainingArguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-4,
        warmup_steps=0.05,
        weight_decay=0.01,
        bf16=True,
        use_cpu=device == "cpu",
        seed=seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    loss = EmbedDistillLoss(student, distance_metric=distance)
    dataset = Dataset.from_dict({"sentence": texts, "label": vectors.tolist()})
    SentenceTransformerTrainer(student, arguments, train_dataset=dataset, loss=loss).train()
    student.save(output)


if __name__ == "__main__":
    teacher, data, output, layers, distance, steps, seed = sys.argv[1:]
    main(teacher, data, output, layers, distance, int(steps), int(seed))
