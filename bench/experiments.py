#!/usr/bin/env python3
"""What each part of the method is worth: every system, start and control, judged by frozen probes, with its spread.

    python bench/experiments.py --teacher ENCODER --head ENCODER_MLM --data texts.parquet --tasks TASKS --work DIR
    python bench/experiments.py ... --compare width starts     other tables than the systems'
    python bench/experiments.py ... --quick                    ten minutes on a CPU: few systems, 60 steps, one seed
    python bench/experiments.py --report                       EXPERIMENTS.md and its plots, of what was measured

A cell is a run of `minilm-train`, or a control, with one seed. Stop the command when you like: cells that are done
stand in bench/results/experiments.csv, and a run that was cut off goes on from its last checkpoint. ENCODER_MLM is what
`bench/masked_lm_head.py` makes of ENCODER. TASKS holds folders stsb, trec and sst2 of files (see minilm-eval).
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path

from _arguments import add_commit, add_out, make_parser, positive
from _cells import Sources, make
from _curves import CurveRow, curves
from _experiments import COMPARISONS, QUICK, SYSTEMS
from _report import DOCUMENT, ExperimentRow, write_report
from _results import old_rows, replace, this_commit, write_csv
from _scores import read_tasks, scores

CSV, CURVES = "experiments.csv", "experiments_curves.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a cell failed; 2 for a wrong flag."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.report:
        rows, drawn = old_rows(ExperimentRow, args.out / CSV), old_rows(CurveRow, args.out / CURVES)
        write_report(rows, drawn, DOCUMENT, args.out)
        return 0
    if missing := [name for name in ("teacher", "data", "tasks", "work") if getattr(args, name) is None]:
        parser.error(f"--{missing[0]} is missing")
    path = (args.work if args.quick else args.out) / CSV
    seeds = range(1, 2 if args.quick else args.seeds + 1)
    chosen = [QUICK] if args.quick else [COMPARISONS[name] for name in args.compare]
    cells = list(dict.fromkeys(chain.from_iterable(comparison.cells(seeds) for comparison in chosen)))
    done = {row.cell for row in old_rows(ExperimentRow, path)}
    wanted = [name for name in args.only or SYSTEMS if args.head or not SYSTEMS[name].head]
    left = [cell for cell in cells if cell not in done and cell.system in wanted and cell.steps <= args.max_steps]
    print(f"{len(cells)} models, {len(left)} of them still to be made", flush=True)

    sources = Sources(args.teacher, args.head, args.data, args.work)
    tasks, commit, failed = read_tasks(args.tasks), args.commit or this_commit(), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(make, cell, sources): cell for cell in left}
        for run in as_completed(runs):
            cell = runs[run]
            if error := run.exception():
                failed += 1
                print(f"{cell.name}: {error}", file=sys.stderr, flush=True)
                continue
            values = scores(run.result(), tasks)
            rows = [ExperimentRow.of(cell, Path(args.data), task, value, commit) for task, value in values.items()]
            write_csv(replace(old_rows(ExperimentRow, path), rows), path)
            print(cell.name, *(f"{task} {value:.1f}" for task, value in values.items()), sep="  ", flush=True)
    commits = {row.cell: row.commit for row in old_rows(ExperimentRow, path)}
    if drawn := list(curves({cell: commits[cell] for cell in cells if cell in commits}, args.work)):
        file = path.with_name(CURVES)
        write_csv(replace(old_rows(CurveRow, file), drawn), file, digits=8)
    return int(failed > 0)


def _parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--teacher", metavar="NAME|DIR", help="a sentence encoder of 6 layers, 384 wide")
    parser.add_argument("--head", metavar="DIR", help="the same with a masked-LM head; without it some are left out")
    parser.add_argument("--data", metavar="FILE", help="a .parquet file with the column text, to distil on")
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="folder of the tasks' folders")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for the models")
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, default=["systems"], help="which tables")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help="of these tables some lines")
    parser.add_argument("--max_steps", type=positive, default=5000, metavar="N", help="and none of more steps")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each cell (default: 3)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--quick", action="store_true", help="ten minutes on a CPU; the results go to --work")
    parser.add_argument("--report", action="store_true", help="write the document of what was measured, and stop")
    add_out(parser)
    add_commit(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
