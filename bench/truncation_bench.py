#!/usr/bin/env python3
"""What it saves to stop both models where the relations end, and that it changes nothing else.

    python bench/truncation_bench.py      table on the terminal, bench/results/truncation_<device>.csv

A teacher runs up to its layer's projections and a student up to its last layer's; "whole" is the same step with both
models run to their outputs. BERT's sizes with random weights; a smaller batch on a CPU.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from _measure import Work, time_ms
from _results import RESULTS, device_slug, environment
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from minilm import MiniLMLoss, build_student, capture
from minilm.models.students import freeze_unused

BASE = BertConfig()
LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
CASES = {  # teacher, its layer, relation heads, the student's layers and width
    "BERT-base, layer 12, to 6x384": (BASE, 12, 48, 6, 384),
    "BERT-base, layer 12, to 3x384": (BASE, 12, 48, 3, 384),
    "BERT-large, layer 21, to 6x384": (LARGE, 21, 64, 6, 384),
}
COLUMNS = ("case", "part", "B", "N", "whole_ms", "stopped_ms", "saved_pct", "gpu", "torch", "commit", "date")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length = (32, 512) if device == "cuda" else (2, 128)
    where = environment(device, args.commit)
    rows = []
    for case, (config, layer, relation_heads, layers, width) in CASES.items():
        teacher = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)  # type: ignore[no-untyped-call]
        student = build_student(teacher, num_layers=layers, hidden_size=width, init="random", seed=0).train()
        freeze_unused(student, ("qq", "kk", "vv"))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        teacher.to(device, dtype)
        student.to(device)
        ids = torch.randint(config.vocab_size, (batch, length), device=device)
        for part, works in _parts(teacher, layer, student, relation_heads, ids).items():
            whole, stopped = (timing.p50 for timing in time_ms(works, device))
            saved = round(100 * (1 - stopped / whole), 1)
            values = (case, part, batch, length, round(whole, 2), round(stopped, 2), saved)
            rows.append(dict(zip(COLUMNS, values, strict=False)) | {name: where[name] for name in COLUMNS[7:]})
            print(f"{case}: {part:8} whole {whole:8.2f} ms, stopped {stopped:8.2f} ms, {saved:.1f} % saved", flush=True)
    path = args.out / f"truncation_{device_slug(device)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(path)
    return 0


def _parts(
    teacher: PreTrainedModel, layer: int, student: PreTrainedModel, relation_heads: int, ids: Tensor
) -> dict[str, list[Work]]:
    """For each part of a step the work whole and stopped."""
    criterion = MiniLMLoss(("qq", "kk", "vv"), relation_heads=relation_heads)

    def qkv(model: PreTrainedModel, layer: int, stop: bool) -> tuple[Tensor, Tensor, Tensor]:
        with capture(model, (layer,), stop=stop) as captured:
            model(input_ids=ids)
        return captured[layer]

    def step(stop: bool, _: None) -> None:
        with torch.no_grad():
            teacher_qkv = qkv(teacher, layer, stop)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            criterion(teacher_qkv, qkv(student, -1, stop))[0].backward()
        student.zero_grad()

    def forward(stop: bool, _: None) -> None:
        with torch.no_grad():
            qkv(teacher, layer, stop)

    return {
        "teacher": [Work(partial(forward, stop)) for stop in (False, True)],
        "step": [Work(partial(step, stop)) for stop in (False, True)],
    }


if __name__ == "__main__":
    sys.exit(main())
