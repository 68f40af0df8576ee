#!/usr/bin/env python3
"""What a distillation step of each system costs: the same student and batch, time, peak memory, parameters of its own.

    python bench/systems_bench.py            on a CPU a teacher 6x384, on CUDA BERT-base's size, into bench/results/
    python bench/systems_bench.py --markdown the table of the README from that file, nothing measured

The student has half the teacher's layers and its width, so that every system takes it. In a step both models read a
batch of whole sequences, the teacher in bf16 on CUDA; then come the loss, the backward and AdamW. Weights are random:
they change no time.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from _arguments import add_commit, add_out, make_parser
from _compare import attempt
from _measure import Work, peak_mib, release, time_ms
from _results import device_slug, environment, old_rows, replace, write_csv
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from minilm.models.observe import observe
from minilm.models.probes import base_of
from minilm.models.students import build_student
from minilm.objectives.embedding import sentence_embedding
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import LOSS, Objective, Term
from minilm.training.model import DistillationModel

MASKED_SHARE = 0.15


class Sizes(NamedTuple):
    teacher: BertConfig
    batch: int
    n: int


SMALL = Sizes(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536), batch=16, n=128)
BASE = Sizes(BertConfig(), batch=32, n=512)


@dataclass(kw_only=True)
class SystemRow:
    """A step of one system."""

    system: str
    B: int
    N: int
    own_parameters: int | None = None  # trained and not part of the student
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    peak_mib: float | None = None  # above both models and the optimiser's state
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.system, self.B, self.N, self.gpu)


def _every_layer(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[int, int]:
    count = student.config.num_hidden_layers
    return {layer: layer * teacher.config.num_hidden_layers // count for layer in range(1, count + 1)}


def _layer_to_layer(name: str) -> Callable[[PreTrainedModel, PreTrainedModel], list[Term]]:
    return lambda teacher, student: SYSTEMS[name].terms(teacher, student, layer_map=_every_layer(teacher, student))


def _embedding(teacher: PreTrainedModel, student: PreTrainedModel) -> list[Term]:
    return [sentence_embedding(teacher, student)]


# name in the table: the system, which says what both models come with, and its terms
MEASURED: dict[str, tuple[str, Callable[[PreTrainedModel, PreTrainedModel], list[Term]]]] = {
    "minilm": ("minilm", SYSTEMS["minilm"].terms),
    "minilm-v2": ("minilm-v2", SYSTEMS["minilm-v2"].terms),
    "minilm, layer to layer": ("minilm", _layer_to_layer("minilm")),
    "mlm-kd": ("mlm-kd", SYSTEMS["mlm-kd"].terms),
    "distilbert": ("distilbert", SYSTEMS["distilbert"].terms),
    "tinybert": ("tinybert", SYSTEMS["tinybert"].terms),
    "mobilebert": ("mobilebert", _layer_to_layer("mobilebert")),
    "embedding": ("embedding", _embedding),
}


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a system failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table of what was measured, and stop")
    add_out(parser)
    add_commit(parser)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = BASE if device == "cuda" else SMALL
    path = args.out / f"systems_{device_slug(device)}.csv"
    rows, measured = old_rows(SystemRow, path), []
    if args.markdown:
        print(markdown(rows))
        return 0
    where: dict[str, Any] = {**environment(device, args.commit), "transformers": transformers.__version__}
    for name in MEASURED:
        row = SystemRow(system=name, B=sizes.batch, N=sizes.n, **where)
        row.note = attempt(partial(measure, row, sizes, device))
        release(device)
        measured.append(row)
        print(f"{name:24}  {row.note or f'{row.ms_p50:.0f} ms  peak {row.peak_mib:,.0f} MiB'}", flush=True)
        rows = replace(rows, [row])
        write_csv(rows, path)
    print(path)
    return int(any(row.note.startswith("failed") for row in measured))


def measure(row: SystemRow, sizes: Sizes, device: str) -> None:
    """Fills the row."""
    step, row.own_parameters = make_step(row.system, sizes, device)
    work = Work(lambda _: step())
    [(row.ms_p20, row.ms_p50, row.ms_p80)] = time_ms([work], device)
    row.peak_mib = peak_mib(work, device)


def make_step(name: str, sizes: Sizes, device: str) -> tuple[Callable[[], float], int]:
    """A step that returns its loss, and how many parameters the system's terms have."""
    system, make_terms = MEASURED[name]
    whole: Any = BertForMaskedLM(sizes.teacher)
    whole.eval()
    teacher: Any = whole if SYSTEMS[system].head else base_of(whole)
    student = build_student(
        teacher, num_layers=sizes.teacher.num_hidden_layers // 2, seed=0, with_head=SYSTEMS[system].head
    )
    teacher.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    student.to(device)  # type: ignore[arg-type]
    objective = Objective(make_terms(teacher, student))
    model = DistillationModel(student, objective).to(device).train()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        objective.freeze_unused(teacher, student)
    ids = torch.randint(sizes.teacher.vocab_size, (sizes.batch, sizes.n), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = dict(batch)
    if SYSTEMS[system].masked:
        batch["labels"] = torch.where(torch.rand(ids.shape, device=device) < MASKED_SHARE, ids, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        with torch.no_grad():
            given = observe(teacher, inputs, objective.teacher)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(given, **batch)[LOSS]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, sum(parameter.numel() for parameter in objective.parameters())


def markdown(rows: Sequence[SystemRow]) -> str:
    """Lines of the README's table: system, parameters of its own, milliseconds, MiB."""
    return "\n".join(
        f"| {row.system} | {row.own_parameters:,} | {row.ms_p50:,.0f} | {row.peak_mib:,.0f} |"
        for row in rows
        if row.ms_p50 is not None and row.peak_mib is not None
    )


if __name__ == "__main__":
    sys.exit(main())
