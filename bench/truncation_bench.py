#!/usr/bin/env python3
"""What it saves to stop both models where the relations end.

    python bench/truncation_bench.py      table on the terminal, bench/results/truncation_<device>.csv

Stopped, a teacher runs up to the projections of its layer and a student up to those of its last layer. Whole, both
models run to their outputs. The models have BERT's sizes and random weights. On a CPU the batch is smaller.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _arguments import add_commit, add_out, make_parser
from _measure import Work, time_ms
from _results import device_slug, environment, old_rows, replace, write_csv
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


@dataclass(kw_only=True)
class Row:
    """Median times of one piece of work with both models whole and stopped."""

    case: str
    work: str  # "teacher": its forward; "step": forward of both, loss and backward
    B: int
    N: int
    whole_ms: float
    stopped_ms: float
    saved_pct: float
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.case, self.work, self.B, self.N, self.gpu)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_out(parser)
    add_commit(parser)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length = (32, 512) if device == "cuda" else (2, 128)
    where: dict[str, Any] = environment(device, args.commit)
    path = args.out / f"truncation_{device_slug(device)}.csv"
    rows = old_rows(Row, path)
    for case, (config, layer, relation_heads, layers, width) in CASES.items():
        teacher = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)  # type: ignore[no-untyped-call]
        student = build_student(teacher, num_layers=layers, hidden_size=width, init="random", seed=0).train()
        freeze_unused(student, ("qq", "kk", "vv"))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        teacher.to(device, dtype)
        student.to(device)
        ids = torch.randint(config.vocab_size, (batch, length), device=device)
        for work, works in _works(teacher, layer, student, relation_heads, ids).items():
            whole, stopped = (timing.p50 for timing in time_ms(works, device))
            saved = 100 * (1 - stopped / whole)
            times: dict[str, Any] = {"whole_ms": whole, "stopped_ms": stopped, "saved_pct": saved}
            rows = replace(rows, [Row(case=case, work=work, B=batch, N=length, **times, **where)])
            write_csv(rows, path)
            print(f"{case}: {work:8} whole {whole:8.2f} ms, stopped {stopped:8.2f} ms, {saved:.1f} % saved", flush=True)
    print(path)
    return 0


def _works(
    teacher: PreTrainedModel, layer: int, student: PreTrainedModel, relation_heads: int, ids: Tensor
) -> dict[str, list[Work]]:
    """By name the same work whole and stopped."""
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
