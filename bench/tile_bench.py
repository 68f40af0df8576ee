#!/usr/bin/env python3
"""How long each kernel takes with which tiles on this GPU: what the pinned tiles of _plan.py are chosen from.

    python bench/tile_bench.py                                  every kernel, into bench/results/
    python bench/tile_bench.py --kernel rows keys --case v1-384 --n 2048

All candidates are compiled first, in parallel processes. Times are medians of the kernel alone. "forward" is the sweep
over rows without dX, "rows" is that with dX, "keys" is the sweep for dY, and "self" is that of a self relation.
"""

import itertools
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from _arguments import add_commit, add_out, make_parser, positive
from _cases import FAMILIES, Case, Inputs, make_inputs, select_cases
from _launches import SWEEPS, make_launch, make_relations, pinned_tiles
from _results import device_slug, environment, old_rows, replace, write_csv
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from minilm_kernels._relations import Relations
from minilm_kernels._triton._plan import Tiles, architecture

CASES = ("v1-384", "v1-768", "v2-48")
LENGTHS = (512, 2048)
# Tokens that a program keeps, tokens of a tile that it meets, warps, registers. (64 tokens in 8 warps would be computed
# twice.) 168 registers leave room for three programs of four warps on a multiprocessor, 128 for four, 96 for five.
SHAPES: tuple[tuple[int, int, int, int | None], ...] = (
    (64, 32, 4, None),
    (64, 32, 4, 128),
    (64, 32, 4, 96),
    (64, 64, 4, None),
    (64, 64, 4, 168),
    (64, 64, 4, 128),
    (64, 64, 4, 96),
    (64, 128, 4, None),
    (128, 32, 4, None),
    (128, 32, 4, 128),
    (128, 64, 4, None),
    (128, 64, 8, 128),
)
STAGES = (2, 3)
REP_MS = 8.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Median time of one kernel with one choice of tiles, and what the compiler made of it."""

    kernel: str
    case: str
    N: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    pinned: bool
    ms: float | None  # None: the chip has no room for it
    spills: int | None
    registers: int | None
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        sizes = (self.block_m, self.block_n, self.num_warps, self.num_stages, self.max_registers)
        return (self.kernel, self.case, self.N, *sizes, self.gpu)


def candidates(kernel: str) -> list[Tiles]:
    """Tiles as (rows, keys, warps, stages); the sweep for dY keeps keys and meets rows."""
    swap = kernel == "keys"
    return [
        Tiles(*((other, own) if swap else (own, other)), num_warps, num_stages, max_registers)
        for (own, other, num_warps, max_registers), num_stages in itertools.product(SHAPES, STAGES)
    ]


def relations_of(kernel: str, names: tuple[str, ...], inputs: Inputs) -> Relations:
    """Of the relations `names` the self relations where the kernel is for those, else QK alone."""
    q, k, v = (x.detach() for x in inputs.student)
    self_relations = [name for name in names if name[0] == name[1]]
    return make_relations(kernel, ("qk", *self_relations), inputs.teacher, (q, k, v))


def compile_candidate(kernel: str, case: Case, shape: Tiles) -> None:
    """Fills Triton's cache. A candidate that the chip has no room for is reported when it is timed."""
    relations = relations_of(kernel, case.relations, make_inputs(case, "cuda"))
    device = torch.device("cuda")
    try:
        make_launch(kernel, relations, architecture(device), shape).run(device)
        torch.cuda.synchronize()
    except OutOfResources:
        pass


def measure(kernel: str, case: Case, where: dict[str, Any]) -> list[Row]:
    """A row of each candidate."""
    relations = relations_of(kernel, case.relations, make_inputs(case, "cuda"))
    device = torch.device("cuda")
    chip = architecture(device)
    pinned = pinned_tiles(kernel, relations, chip)
    rows = []
    for shape in candidates(kernel):
        launch = make_launch(kernel, relations, chip, shape)
        sizes: dict[str, Any] = {"kernel": kernel, "case": case.name, "N": case.n, "pinned": shape == pinned}
        ms = spills = registers = None
        try:
            ms = float(do_bench(partial(launch.run, device), rep=REP_MS, warmup=REP_MS / 3, return_mode="median"))
            schedule = launch.schedule
            compiled = schedule.kernel[(schedule.programs,)](**launch.arguments, **schedule.options)
            spills, registers = compiled.n_spills, compiled.n_regs
        except OutOfResources:
            pass
        rows.append(Row(**sizes, **shape._asdict(), ms=ms, spills=spills, registers=registers, **where))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 without a GPU."""
    parser = make_parser(__doc__)
    parser.add_argument("--kernel", nargs="+", choices=SWEEPS, default=SWEEPS, metavar="NAME", help=", ".join(SWEEPS))
    parser.add_argument("--case", nargs="+", choices=FAMILIES, default=CASES, metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument("--n", nargs="+", type=positive, default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes that compile")
    add_out(parser)
    add_commit(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "this machine has no CUDA device; bench/static_report.py counts instructions without one", file=sys.stderr
        )
        return 2
    path = args.out / f"tiles_{device_slug('cuda')}.csv"
    rows = old_rows(Row, path)
    where = environment("cuda", args.commit)
    start = time.monotonic()
    chosen = select_cases(True, args.case, args.n)
    work = list(itertools.product(args.kernel, chosen))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_candidate, *item, shape) for item in work for shape in candidates(item[0])]
        for job in jobs:
            job.result()
    print(f"{len(jobs)} candidates compiled in {time.monotonic() - start:.0f} s", flush=True)
    for kernel, case in work:
        found = measure(kernel, case, where)
        rows = replace(rows, found)
        write_csv(rows, path)
        print(f"\n{kernel}  {case}")
        for row in sorted(found, key=lambda row: row.ms or float("inf"))[:6] + [row for row in found if row.pinned]:
            print(
                f"  {row.ms or 0:8.3f} ms  {row.block_m}x{row.block_n} w{row.num_warps} s{row.num_stages}"
                f" of {row.max_registers}  {row.registers} registers, {row.spills} spilled{'  pinned' * row.pinned}",
                flush=True,
            )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
