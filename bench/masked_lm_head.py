#!/usr/bin/env python3
"""A masked-LM head for an encoder that has none, so that mlm, mlm-kd, distilbert and mobilebert have a teacher.

    python bench/masked_lm_head.py --model ENCODER --data texts.parquet --output_dir encoder-mlm

The head is that of transformers' class for the encoder, its output matrix the encoder's word embeddings. The head alone
is trained, with 15 % of the tokens masked as in BERT: the encoder stays what it was, and its sentence vectors with it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _arguments import make_parser, positive
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from minilm.models.embeddings import sentence_files
from minilm.models.probes import base_of

HELD_OUT, SEED = 512, 0


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="name or folder of the encoder")
    parser.add_argument("--data", required=True, metavar="FILE", help="a .parquet file with the column text")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="for the encoder with its head")
    parser.add_argument("--max_steps", type=positive, default=1000, metavar="N", help="of 32 texts (default: 1000)")
    parser.add_argument("--max_length", type=positive, default=64, metavar="N", help="tokens of a text (default: 64)")
    before, after = train_head(**vars(parser.parse_args(argv)))
    print(f"cross-entropy of held-out masked tokens: {before:.2f} nats before, {after:.2f} after")
    return 0


def train_head(model: str, data: str, output_dir: str, max_steps: int, max_length: int) -> tuple[float, float]:
    """Saves the encoder with its head; the cross-entropy of held-out masked tokens before and after."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole: Any = AutoModelForMaskedLM.from_pretrained(model)
    base_of(whole).requires_grad_(False)
    for parameter in whole.get_output_embeddings().parameters():
        parameter.requires_grad_(parameter is not whole.get_input_embeddings().weight)
    splits = _read(data, max_steps * 32).map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns=["text"],
    )
    trainer = Trainer(
        whole,
        TrainingArguments(
            output_dir,
            max_steps=max_steps,
            learning_rate=1e-3,
            warmup_steps=0.05,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=SEED,
        ),
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=SEED),
        splits.select(range(HELD_OUT, len(splits))),
        splits.select(range(HELD_OUT)),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    whole.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    if sentences := sentence_files(model):
        sentences.copy_to(Path(output_dir))
    return before, after


def _read(data: str, count: int) -> Dataset:
    texts = load_dataset("parquet", data_files=data, split="train").select_columns(["text"]).shuffle(seed=SEED)
    return texts.select(range(min(len(texts), HELD_OUT + count)))


if __name__ == "__main__":
    sys.exit(main())
