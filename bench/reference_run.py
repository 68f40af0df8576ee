#!/usr/bin/env python3
"""The reference run: the demonstration under several seeds, each part of its loss by step.

    python bench/reference_run.py --seeds 5

It writes `minilm/cli/reference_run.json`, with which `minilm-train --check` compares. Each seed is a run of
`minilm-train --seed S` in DIR/seed-S: one that is finished is not run again, one that was stopped goes on. All of them
belong to one environment, whose versions the file names: take another DIR for another. Needs the `demo` extra.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from _arguments import add_commit, make_parser, positive
from _results import environment
from scipy.stats import t as student_t

from minilm.cli.check import PREFIXES, REFERENCE, WINDOW
from minilm.cli.demo import TEACHER_NAME

CONFIDENCE = 0.999  # of each value that is compared


class SeedRun(NamedTuple):
    """What one seed left: its metrics.json, and the Trainer's log."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """0; the exit code of a run that failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="seeds 1 to N, at least 2 (default: 5)")
    parser.add_argument("--work", type=Path, default=Path("reference-run"), metavar="DIR", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=REFERENCE, metavar="FILE", help="file to write")
    add_commit(parser)
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds is 1: a spread needs at least 2")
    seeds = range(1, args.seeds + 1)
    for seed in seeds:
        if code := run_seed(seed, folder(args.work, seed)):
            return code
    runs = [read_run(folder(args.work, seed)) for seed in seeds]
    where = environment("cuda" if runs[0].metrics["device"] != "cpu" else "cpu", args.commit)
    aside = args.out.with_suffix(".tmp")
    aside.write_text(as_lines(summary(runs, list(seeds), where)), encoding="utf-8")
    os.replace(aside, args.out)
    print(args.out)
    return 0


def folder(work: Path, seed: int) -> Path:
    return work / f"seed-{seed}"


def run_seed(seed: int, output: Path) -> int:
    """The run's exit code, 0 for one that is finished already."""
    if (output / "metrics.json").exists():
        return 0
    flags = ["--seed", str(seed), "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    return subprocess.run([sys.executable, "-m", "minilm.cli", *flags]).returncode


def read_run(output: Path) -> SeedRun:
    [checkpoint] = output.glob("checkpoint-*")  # the demonstration keeps its last one
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return SeedRun(json.loads((output / "metrics.json").read_text(encoding="utf-8")), state["log_history"])


def summary(runs: Sequence[SeedRun], seeds: Sequence[int], where: dict[str, str]) -> dict[str, Any]:
    """What the file holds: how it was made, and lists of values in the order of the seeds."""
    metrics = [run.metrics for run in runs]
    data = metrics[0]["data"]
    return {
        "command": f"python bench/reference_run.py --seeds {len(seeds)}",
        "device": where["gpu"],
        "commit": where["commit"],
        "date": where["date"],
        "python": platform.python_version(),
        "torch": where["torch"],
        "transformers": transformers.__version__,
        "teacher": f"{TEACHER_NAME} {version(TEACHER_NAME)}",
        "sequences": {"training": data["train_sequences"], "held-out": data["heldout_sequences"]},
        "seeds": list(seeds),
        "t_quantile": round(float(student_t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom(runs[0], len(seeds)))), 3),
        "agreement": {
            f"{when} {name}": [round(m["agreement"][when][name], 4) for m in metrics]
            for when in ("start", "end")
            for name in ("correlation", "neighbours")
        },
        "curves": [
            {"split": split, "part": part, **_curve(runs, prefix + part)}
            for split, prefix in PREFIXES.items()
            for part in metrics[0]["parts"]
        ],
    }


def degrees_of_freedom(run: SeedRun, seeds: int) -> int:
    """Of a relative spread that all steps have in common, but 0."""
    return (seeds - 1) * (int(run.metrics["steps"]) // WINDOW)


def _curve(runs: Sequence[SeedRun], name: str) -> dict[str, Any]:
    """Steps, and the losses of each seed there."""
    curves = [{row["step"]: float(f"{row[name]:.5g}") for row in run.history if name in row} for run in runs]
    return {"steps": list(curves[0]), "losses": [[curve[step] for step in curves[0]] for curve in curves]}


def as_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each key, and of the curves for each seed."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
