#!/usr/bin/env python3
"""A whole distillation step: how much of it is the loss, and the largest batch that each way to compute it allows.

    python bench/step_bench.py            BERT-base's size as teacher, students 6x384 and 6x768, into bench/results/
    python bench/step_bench.py --quick    one student and objective; on a CPU always tiny models, to see that it runs

In a step the teacher computes q, k, v of its last layer in bf16, and the student those of its own under autocast and in
training mode. Then come the loss, the backward and AdamW. Weights are random: they change no time.

The loss's share is the time of its forward and backward alone, on the q, k, v of such a step, as a part of the time of
the whole step. Alone, the loss also waits for its own launches, which in a step the device's other work hides: where
the loss is shorter than its launches, the true share is smaller.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from _arguments import add_commit, add_out, make_parser
from _cases import V1, V2, Triple, as_leaves
from _compare import attempt
from _measure import Work, peak_mib, release, time_ms
from _results import StepRow, device_slug, environment, old_rows, replace, write_csv
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from minilm import fused_minilm_loss
from minilm.models.capture import attention_qkv
from minilm.models.students import build_student, freeze_unused

OBJECTIVES: dict[str, tuple[tuple[str, ...], int | None]] = {"v1": (V1, None), "v2-48": (V2, 48)}
PROVIDERS = ("fused", "eager", "compile")
SEARCHED = "v2-48"  # the objective whose largest batch is looked for
BATCH_LIMIT = 1 << 14


class Sizes(NamedTuple):
    teacher: BertConfig
    students: dict[str, dict[str, Any]]
    batch: int
    n: int


BASE = Sizes(
    BertConfig(),  # BERT-base: 12 layers, 768 wide, 12 heads, 30,522 entries in the vocabulary
    {"6x384": {"num_layers": 6, "hidden_size": 384}, "6x768": {"num_layers": 6, "hidden_size": 768}},
    batch=32,
    n=512,
)
TINY = Sizes(
    BertConfig(vocab_size=99, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96),
    {"1x48": {"num_layers": 1, "hidden_size": 48}},
    batch=2,
    n=16,
)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a provider failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one student, one objective")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement later than this")
    add_out(parser)
    add_commit(parser)
    args = parser.parse_args(argv)
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = BASE if device == "cuda" else TINY
    where: dict[str, Any] = {**environment(device, args.commit), "transformers": transformers.__version__}
    path = args.out / f"step_bench_{device_slug(device)}.csv"
    rows, measured = old_rows(StepRow, path), []
    for student in list(sizes.students)[: 1 if args.quick else None]:
        for objective in [SEARCHED] if args.quick else OBJECTIVES:
            for provider in PROVIDERS if device == "cuda" else PROVIDERS[:2]:
                if time.monotonic() - start > args.seconds:
                    print(f"time is up, not measured: {student} {objective} {provider}")
                    continue
                row = StepRow(
                    student=student, objective=objective, provider=provider, B=sizes.batch, N=sizes.n, **where
                )
                row.note = attempt(partial(measure, row, sizes, device))
                release(device)
                measured.append(row)
                print(_line(row), flush=True)
                rows = replace(rows, [row])
                write_csv(rows, path)
    print(path)
    if device == "cpu":
        print("This machine has no GPU: these models are tiny and their times say nothing about training.")
    return int(any(row.note.startswith("failed") for row in measured))


def measure(row: StepRow, sizes: Sizes, device: str) -> None:
    """Fills the row. On CUDA it also searches for the largest batch of one objective."""
    relations, heads = OBJECTIVES[row.objective]
    teacher = BertModel(sizes.teacher, add_pooling_layer=False).eval()  # type: ignore[no-untyped-call]
    student = build_student(teacher, init="random", seed=0, **sizes.students[row.student])
    freeze_unused(student, relations)
    teacher.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    student.to(device).train()  # type: ignore[arg-type]
    loss = loss_of(row.provider, relations, heads, device)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(ids: Tensor) -> None:
        loss(*_forward(teacher, student, ids)).backward()
        optimizer.step()
        optimizer.zero_grad()

    ids = _ids(sizes, row.B, device)
    whole = Work(lambda _: step(ids))
    timing, loss_timing = time_ms([whole, _loss_alone(loss, *_forward(teacher, student, ids))], device)
    row.ms_p20, row.ms_p50, row.ms_p80 = timing
    row.tokens_per_s = row.B * row.N / timing.p50 * 1e3
    row.loss_pct = 100 * loss_timing.p50 / timing.p50
    row.peak_mib = peak_mib(whole, device)
    if device == "cuda" and row.objective == SEARCHED:
        row.largest_batch = largest_batch(lambda batch: _fits(step, _ids(sizes, batch, device), device), row.B)


def _loss_alone(loss: Callable[[Triple, Triple], Tensor], teacher: Triple, student: Triple) -> Work:
    """Forward and backward of the loss without the models, on the q, k, v of a step."""
    leaves = as_leaves(student)
    return Work(lambda _: torch.autograd.grad(loss(teacher, leaves), leaves))


def loss_of(
    provider: str, relations: tuple[str, ...], heads: int | None, device: str
) -> Callable[[Triple, Triple], Tensor]:
    fused = "triton" if device == "cuda" else "chunked"
    implementation = fused if provider == "fused" else "reference"

    def loss(teacher: Triple, student: Triple) -> Tensor:
        return fused_minilm_loss(teacher, student, relations, relation_heads=heads, implementation=implementation)

    if provider != "compile":
        return loss
    torch.compiler.reset()
    compiled: Callable[[Triple, Triple], Tensor] = torch.compile(loss, fullgraph=True)
    return compiled


def _forward(teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor) -> tuple[Triple, Triple]:
    inputs = {"input_ids": ids}
    with torch.no_grad():
        teacher_qkv = attention_qkv(teacher, inputs)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return teacher_qkv, attention_qkv(student, inputs)


def _ids(sizes: Sizes, batch: int, device: str) -> Tensor:
    return torch.randint(sizes.teacher.vocab_size, (batch, sizes.n), device=device)


def _fits(step: Callable[[Tensor], None], ids: Tensor, device: str) -> bool:
    try:
        step(ids)
    except torch.OutOfMemoryError:
        return False
    finally:
        release(device)
    return True


def largest_batch(fits: Callable[[int], bool], known: int) -> int:
    """The largest batch that fits, to an eighth, from one that is known to; at most BATCH_LIMIT."""
    good, bad = known, 2 * known
    while bad <= BATCH_LIMIT and fits(bad):
        good, bad = bad, 2 * bad
    while bad <= BATCH_LIMIT and bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _line(row: StepRow) -> str:
    name = f"{row.student} {row.objective:6} {row.provider:8} B={row.B} N={row.N}"
    if row.ms_p50 is None:
        return f"{name}  {row.note}"
    largest = f"  largest batch {row.largest_batch}" if row.largest_batch else ""
    return (
        f"{name}  {row.ms_p50:.2f} ms ({row.ms_p20:.2f} to {row.ms_p80:.2f})  {row.tokens_per_s:,.0f} tokens/s  "
        f"loss {row.loss_pct:.1f}%  peak {row.peak_mib:,.1f} MiB{largest}"
    )


if __name__ == "__main__":
    sys.exit(main())
