#!/usr/bin/env python3
"""What calls of the loss leave behind: memory after many of them, over that after the first.

    python bench/leaks.py                 10,000 calls with gradients, of changing shapes
    python bench/leaks.py --calls 500

Ends with 1 where Python's objects grew by more than 100 KiB (tracemalloc), or the process by more than 8 MiB.
"""

import gc
import itertools
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from _arguments import make_parser, positive

from minilm import fused_minilm_loss

WARM = 400  # calls until every cache is full: those of layouts hold 256
SHAPES = [(batch, n, dim) for batch in (1, 2) for n in range(1, 26) for dim in range(4, 12)]
OPTIONS: list[dict[str, object]] = [{}, {"causal": True}, {"relations": ("qq", "kk", "vv"), "reduction": "token"}]


class Held(NamedTuple):
    objects: int  # bytes that Python allocated
    process: int  # bytes resident


MOST = Held(objects=100 * 2**10, process=8 * 2**20)


def held() -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(tracemalloc.get_traced_memory()[0], pages * 4096)


def call(shape: tuple[int, int, int], options: dict[str, object]) -> None:
    batch, n, dim = shape
    teacher = tuple(torch.randn(batch, 2, n, dim) for _ in range(3))
    student = tuple(torch.randn(batch, 2, n, dim, requires_grad=True) for _ in range(3))
    mask = torch.rand(batch, n) < 0.8
    fused_minilm_loss(teacher, student, attention_mask=mask, **options).backward()  # type: ignore[arg-type]


def growth(calls: int) -> Held:
    """Bytes that the calls after the first WARM left behind."""
    changing = itertools.cycle(itertools.product(SHAPES, OPTIONS))
    tracemalloc.start()  # before the caches fill, as what replaces an entry counts
    for _ in range(WARM):
        call(*next(changing))
    before = held()
    for _ in range(calls):
        call(*next(changing))
    after = held()
    tracemalloc.stop()
    return Held(after.objects - before.objects, after.process - before.process)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--calls", type=positive, default=10_000, metavar="N", help="how many (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    grown = growth(args.calls)
    print(
        f"{args.calls:,} calls: {grown.objects / 1024:+.1f} KiB of objects, {grown.process / 2**20:+.1f} MiB of memory"
    )
    return int(grown.objects > MOST.objects or grown.process > MOST.process)


if __name__ == "__main__":
    sys.exit(main())
