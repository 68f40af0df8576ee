#!/usr/bin/env python3
"""What fusing gains: the relation loss against everything else that computes it, in time, memory and error.

    python bench/loss_bench.py                              all cases of this machine, into bench/results/
    python bench/loss_bench.py --quick                      a minute's run
    python bench/loss_bench.py --case v2-48 --n 1024 --batch 8 --heads 12 --dtype fp16

A case is an objective between a teacher and a student: v1-768 is MiniLM v1 with a student 768 wide, v2-48 is MiniLM v2
with 48 relation heads. On a GPU all are measured in bf16, and v1-384 in fp16 and fp32 too. On a CPU the smaller ones
are measured in fp32.

There are three modes. "forward" computes no gradient. "backward" starts from a loss that was computed before. "both" is
what a training step pays. A provider may prepare gradients in its forward, so "both" is the number to compare.

`fused` is the library: its Triton kernels on a GPU, its chunked path on a CPU.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence

import torch
from _arguments import add_commit, add_out, make_parser, positive
from _cases import DTYPES, FAMILIES, Case, make_inputs, select_cases
from _compare import compare
from _exact import exact
from _floor import Rates
from _measure import REP_MS
from _plots import plot
from _providers import COMPILED, PROVIDERS, default_providers
from _results import LossRow, device_slug, environment, merge, old_rows, write_csv
from _table import MODES, loss_table, ratios

CPU_SECONDS = 95  # all must be measured by then: a run ends within two minutes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--case", nargs="+", choices=FAMILIES, default=[], metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument("--n", nargs="+", type=positive, default=[], help="tokens of a sequence, one or several")
    parser.add_argument("--batch", type=positive, help="sequences (default: a fixed number of tokens)")
    parser.add_argument("--heads", type=positive, help="relation heads that the same widths are split into")
    parser.add_argument("--dtype", choices=DTYPES, help="of the inputs (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, default=[], metavar="NAME", help=", ".join(PROVIDERS)
    )
    parser.add_argument("--quick", action="store_true", help="few cases, two lengths, no compile")
    parser.add_argument(
        "--seconds", type=float, help=f"measure for about this long at most (default: on a CPU {CPU_SECONDS})"
    )
    add_out(parser)
    add_commit(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a provider failed or was wrong; 2 for arguments that do not fit."""
    args = parse(argv)
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = device == "cuda"
    try:
        cases = select_cases(cuda, args.case, args.n, args.batch, args.heads, args.dtype, args.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    path = args.out / f"loss_bench_{device_slug(device)}.csv"
    rows = old_rows(LossRow, path)
    seconds = args.seconds if args.seconds is not None else math.inf if cuda else CPU_SECONDS
    deadline = start + seconds
    where = environment(device, args.commit)
    print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton'] or 'none'}")
    rates = _print_rates({case.dtype for case in cases}) if cuda else {}

    measured: list[LossRow] = []
    rep_ms = REP_MS / 5 if args.quick else REP_MS
    for case, names in schedule(cases, args.providers, cuda, args.quick):
        found: list[LossRow] = []
        if time.monotonic() < deadline:
            inputs = make_inputs(case, device)
            truth = exact(case, inputs)
            for new in compare(case, names, inputs, truth, device, rates.get(case.dtype), rep_ms, deadline):
                for row in new:
                    row.__dict__.update(where)
                    outcome = f"{row.ms_p50:.3f} ms" if row.ms_p50 else row.note
                    print(f"  {row.case} {row.dtype} N={row.N} {row.provider} {row.mode}: {outcome}", flush=True)
                found += new
            del inputs, truth
        missing = len(MODES) * len(names) - len(found)
        if missing:
            print(f"time is up (--seconds), {missing} rows not measured: {case}: {', '.join(names)}")
        measured += found
        if measured:
            write_csv(merge(rows, measured), path)

    if not measured:
        return 0
    rows = [row for row in merge(rows, measured) if row.gpu == where["gpu"]]
    settings = {row.setting for row in measured}
    shown = sorted((row for row in rows if row.setting in settings), key=_order)
    print("\n" + loss_table(shown) + "\n\n" + ratios(shown))
    print(f"\n{path}")
    for png in plot(sorted(rows, key=_order), path.with_suffix("")):
        print(png)
    if not cuda:
        print(
            "This machine has no GPU: `fused` is the chunked CPU path here. The Triton kernels are measured on a GPU."
        )
    return int(any(row.note.startswith(("failed", "WRONG")) for row in measured))


def schedule(cases: Sequence[Case], providers: Sequence[str], cuda: bool, quick: bool) -> list[tuple[Case, list[str]]]:
    """What to measure in which order: what is compiled last, because it takes longest."""
    wanted = [(case, list(providers) or default_providers(case, cuda, quick)) for case in cases]
    first = [(case, [name for name in names if name not in COMPILED]) for case, names in wanted]
    last = [(case, compiled) for case, names in wanted if (compiled := [name for name in names if name in COMPILED])]
    return [(case, names) for case, names in first if names] + last


def _print_rates(dtypes: set[str]) -> dict[str, Rates]:
    from _rates import measure_rates

    rates = {dtype: measure_rates(DTYPES[dtype]) for dtype in sorted(dtypes)}
    for dtype, rate in rates.items():
        print(
            f"measured rates: copy {rate.bytes / 1e12:.2f} TB/s, {dtype} product {rate.flops / 1e12:.0f} TFLOP/s, "
            f"exp2 {rate.exps / 1e12:.2f} T/s"
        )
    return rates


def _order(row: LossRow) -> tuple[int, ...]:
    """Lengths of a case in a dtype stand together."""
    group = list(FAMILIES).index(row.case), list(DTYPES).index(row.dtype), -row.heads
    return *group, row.N, list(PROVIDERS).index(row.provider), MODES.index(row.mode)


if __name__ == "__main__":
    sys.exit(main())
