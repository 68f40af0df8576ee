#!/usr/bin/env python3
"""How long each kernel takes with which tiles on this GPU: what the pinned tiles of _plan.py are chosen from.

    python bench/tile_bench.py                                  every kernel, into bench/results/
    python bench/tile_bench.py --kernel rows keys --case v1-384 --n 2048

Compiles every candidate first, in parallel processes. Times are medians of the kernel alone. "forward" is the sweep
over rows without dX, "rows" that with dX, "keys" the sweep for dY, "self" that of a self relation.
"""

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _cases import FAMILIES, Case, make_inputs, select_cases
from _results import RESULTS, device_slug, environment
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from minilm_kernels._relations import Relations
from minilm_kernels._triton._keys import key_launch
from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import Problem, Tiles, architecture, problem_fields, tiles
from minilm_kernels._triton._rows import row_launch
from minilm_kernels._triton._self import self_launch

KERNELS = ("forward", "rows", "keys", "self")
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
    """Median time of one kernel with one choice of tiles."""

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


def candidates(kernel: str) -> list[Tiles]:
    """Tiles as (rows, keys, warps, stages); the sweep for dY keeps keys and meets rows."""
    swap = kernel == "keys"
    return [
        Tiles(*((other, own) if swap else (own, other)), num_warps, num_stages, max_registers)
        for (own, other, num_warps, max_registers), num_stages in itertools.product(SHAPES, STAGES)
    ]


def builder(kernel: str, case: Case) -> tuple[Problem, Callable[[Tiles], Launch]]:
    """The problem that the case is to that kernel, and the launch with given tiles."""
    inputs = make_inputs(case, "cuda")
    is_self = kernel in ("forward", "self")
    of_self: tuple[str, ...] = ("qq", "kk", "vv") if "qq" in case.relations else ("vv",)
    letters = of_self if is_self else ("qk",)
    at = [tuple("qkv".index(letter) for letter in relation) for relation in letters]
    teacher, student = inputs.teacher, [x.detach() for x in inputs.student]
    relations = Relations(
        [teacher[x] for x, _ in at],
        [] if is_self else [teacher[y] for _, y in at],
        [student[x] for x, _ in at],
        [] if is_self else [student[y] for _, y in at],
        None,
        None,
        None,
        1.0 / case.n,
        [1.0] * len(at),
        case.d_t**-0.5,
        case.d_s**-0.5,
        symmetric=True,
        reduces=True,
    )
    problem = Problem(*problem_fields(relations))
    lse_t = torch.zeros(problem.lse_parts, *problem.shape, device="cuda") + 10.0
    lse_s = lse_t.clone()
    dx = [torch.empty_like(x) for x in relations.x_s]
    dy = [torch.empty_like(y) for y in relations.y_s]
    grad = torch.ones((), device="cuda")
    if kernel == "forward":
        return problem, lambda shape: row_launch(relations, problem, lse_t, lse_s, [], shape)
    if kernel == "rows":
        return problem, lambda shape: row_launch(relations, problem, lse_t, lse_s, dx, shape)
    if kernel == "keys":
        return problem, lambda shape: key_launch(relations, problem, lse_t, lse_s, grad, dx, dy, shape)
    bases, factors = ([lse_t.new_zeros(size) for _ in range(2)] for size in (problem.shape[:3], problem.shape))
    return problem, lambda shape: self_launch(relations, problem, lse_t, lse_s, bases, factors, grad, dx, shape)


def compile_candidate(kernel: str, case: Case, shape: Tiles) -> None:
    """Fills Triton's cache; a candidate that the chip has no room for is met again, and said so, when it is timed."""
    try:
        builder(kernel, case)[1](shape).run(torch.device("cuda"))
        torch.cuda.synchronize()
    except OutOfResources:
        pass


def measure(kernel: str, case: Case, shape: Tiles, pinned: bool, build: Callable[[Tiles], Launch]) -> Row:
    launch = build(shape)
    device = torch.device("cuda")
    ms = spills = registers = None
    try:
        ms = float(do_bench(lambda: launch.run(device), rep=REP_MS, warmup=REP_MS / 3, return_mode="median"))
        compiled = launch.kernel[(launch.programs,)](**launch.arguments, **launch.options)
        spills, registers = compiled.n_spills, compiled.n_regs
    except OutOfResources:
        pass
    sizes: dict[str, Any] = {"kernel": kernel, "case": case.name, "N": case.n, "pinned": pinned}
    return Row(**sizes, **shape._asdict(), ms=ms, spills=spills, registers=registers)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--case", nargs="+", choices=FAMILIES, default=CASES)
    parser.add_argument("--n", nargs="+", type=int, default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this machine has no CUDA device: bench/static_report.py counts instructions without one")
        return 2
    start = time.monotonic()
    chosen = select_cases(True, args.case, args.n)
    work = list(itertools.product(args.kernel, chosen))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_candidate, *item, shape) for item in work for shape in candidates(item[0])]
        for job in jobs:
            job.result()
    print(f"{len(jobs)} candidates compiled in {time.monotonic() - start:.0f} s", flush=True)
    rows: list[Row] = []
    for kernel, case in work:
        problem, build = builder(kernel, case)
        pinned = tiles(kernel, problem, architecture(problem.device))
        found = [measure(kernel, case, shape, shape == pinned, build) for shape in candidates(kernel)]
        rows += found
        print(f"\n{kernel}  {case}")
        for row in sorted(found, key=lambda row: row.ms or float("inf"))[:6] + [row for row in found if row.pinned]:
            print(
                f"  {row.ms or 0:8.3f} ms  {row.block_m}x{row.block_n} w{row.num_warps} s{row.num_stages}"
                f" of {row.max_registers}  {row.registers} registers, {row.spills} spilled{'  pinned' * row.pinned}",
                flush=True,
            )
    path = args.out / f"tiles_{device_slug('cuda')}.csv"
    write(rows, path, environment("cuda", args.commit))
    print(path)
    return 0


def write(rows: Sequence[Row], path: Path, where: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(field.name for field in fields(Row)), *where])
        for row in rows:
            writer.writerow([*astuple(row), *where.values()])


if __name__ == "__main__":
    sys.exit(main())
