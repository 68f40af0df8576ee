#!/usr/bin/env python3
"""Kills `minilm-train` at moments drawn by a seed, on the clock, and continues it, until so many rounds are through.

    python tests/kill_rounds.py                             fifty rounds, about ten minutes on one core
    python tests/kill_rounds.py --rounds 4 --mode stream    a few, of one mode

A round is SIGKILL to a run, now to its process alone, now to its data loader's workers too, somewhere between its start
and its end: while it reads, trains, writes a checkpoint, puts the student in its place or writes the report. The output
folder also holds files of a user. After every round

    each checkpoint that was whole is whole still, unless --save_total_limit has let it go for newer ones;
    what is the user's is as it was;

and when a run is finished, its student and its losses are those of a run that nobody disturbed, bit for bit. A finished
run is followed by a new one in the next mode. Prints one JSON object; exit code 1 if anything was lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
from kill_and_resume import forked
from tiny_text import save_teacher, write_lines

from minilm.cli import distill
from minilm.training.folders import INCOMPLETE
from minilm.training.runs import METRICS, checkpoints_of, find_fault, step_of

STEPS = 40
COMMON = [
    *("--student_num_layers", "2", "--student_hidden_size", "16", "--max_length", "24", "--max_steps", str(STEPS)),
    *("--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--save_steps", "1", "--logging_steps", "1"),
    *("--disable_tqdm", "true", "--report_to", "none", "--use_cpu"),
]
MODES = {
    "by length": ["--save_total_limit", "3"],
    "stream": [
        *("--streaming", "--packing", "--shuffle_buffer", "10", "--dataloader_num_workers", "2"),
        *("--save_total_limit", "0"),  # keeps all
    ],
    "packed": ["--packing", "--save_total_limit", "1"],
}
USERS = ("notes.txt", "checkpoint-best/weights.bin", "model.onnx", "runs/events.log")
LATEST = 1.1  # of a whole run's time: so late a kill may come, if the run lasts


class Lost(AssertionError):
    """What a kill has cost."""


def rounds_of(folder: Path, count: int, seed: int, modes: list[str]) -> dict[str, Any]:
    """Runs that many rounds and tells what they were. Raises `Lost`."""
    draw = random.Random(seed)
    teacher, data = str(save_teacher(folder / "teacher")), str(write_lines(folder / "lines.txt", 60))
    found: Counter[str] = Counter()
    finished = killed = 0
    whole: dict[str, tuple[Path, float]] = {}
    while killed < count:
        mode = modes[finished % len(modes)]
        argv = ["--teacher", teacher, "--data", data, *COMMON, *MODES[mode]]
        if mode not in whole:
            whole[mode] = undisturbed(folder / f"whole-{len(whole)}", argv)
        undisturbed_run, seconds = whole[mode]
        output = folder / f"broken-{finished}"
        before = users_files(output)
        resume = ["--resume_from_checkpoint", "auto"]
        steps: set[int] = set()
        while True:
            wait = draw.uniform(0, LATEST * seconds) if killed < count else None
            status = killed_after(wait, [*argv, *resume, "--output_dir", str(output)], alone=draw.random() < 0.5)
            check_users(output, before)
            steps = check_checkpoints(output, steps, limit=limit_of(argv))
            if status not in (0, signal.SIGKILL):
                raise Lost(f"{mode}: the run ended by status {status} in {output}")
            if status:
                killed += 1
                found[where(output)] += 1
                print(f"{killed} of {count}: {mode}, {where(output)}", file=sys.stderr, flush=True)
            if (output / METRICS).exists():
                break
        compare(undisturbed_run, output)
        finished += 1
        shutil.rmtree(output)
    return {"rounds": killed, "finished runs": finished, "killed while": dict(found), "lost": 0}


def undisturbed(output: Path, argv: list[str]) -> tuple[Path, float]:
    """Its folder and how long it took."""
    start = time.monotonic()
    if status := killed_after(None, [*argv, "--output_dir", str(output)], alone=True):
        raise Lost(f"a run that nobody disturbed ended by status {status}")
    return output, time.monotonic() - start


def killed_after(seconds: float | None, argv: list[str], *, alone: bool) -> int:
    """The wait status of a run that is killed after a time, unless it ends before."""
    child = forked(argv, None)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if end is not None and time.monotonic() >= end:
            (os.kill if alone else os.killpg)(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.002)


def limit_of(argv: list[str]) -> int | None:
    return int(argv[argv.index("--save_total_limit") + 1]) or None


def users_files(output: Path) -> dict[str, bytes]:
    """Puts them there."""
    content = {name: f"{name}, which is a user's".encode() for name in USERS}
    for name, text in content.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(text)
    return content


def check_users(output: Path, before: dict[str, bytes]) -> None:
    for name, content in before.items():
        if not (output / name).is_file() or (output / name).read_bytes() != content:
            raise Lost(f"{output / name}, a user's, is not as it was")


def check_checkpoints(output: Path, before: set[int], limit: int | None) -> set[int]:
    """The steps of the checkpoints, which must all be whole, those of before among them or let go for newer ones."""
    for path in checkpoints_of(output):
        if fault := find_fault(path):
            raise Lost(f"{path} is damaged: {fault}")
    now = {step_of(path) for path in checkpoints_of(output)}
    wanted = before if limit is None else set(sorted(before | now)[-limit:])
    if gone := wanted - now:
        raise Lost(f"of the checkpoints in {output}, {sorted(gone)} are gone, there are {sorted(now)}")
    return now


def where(output: Path) -> str:
    """What the run did when it was killed, as far as its folder tells."""
    aside = output / INCOMPLETE
    if aside.exists():
        return "writing the student" if (aside / "student").exists() else "writing a checkpoint"
    if (output / METRICS).exists():
        return "ending"
    if (output / "model.safetensors").exists():
        return "writing the report"
    return "training" if checkpoints_of(output) else "starting"


def compare(one: Path, other: Path) -> None:
    students = [(path / "model.safetensors").read_bytes() for path in (one, other)]
    if students[0] != students[1]:
        raise Lost(f"the student in {other} is not the undisturbed one")
    state = Path(f"checkpoint-{STEPS}", "trainer_state.json")
    logs = [json.loads((path / state).read_text(encoding="utf-8"))["log_history"] for path in (one, other)]
    losses = [[(row["step"], row["loss"]) for row in log if "loss" in row] for log in logs]
    if losses[0] != losses[1]:
        raise Lost(f"the losses of {other} are not the undisturbed ones: {losses}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    distill.SPEED_SECONDS = 0.01  # or most kills would fall into the measuring of speeds
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder + "/cache"
        try:
            print(json.dumps(rounds_of(Path(folder), args.rounds, args.seed, args.mode)))
        except Lost as lost:
            print(json.dumps({"lost": str(lost), "kept for a look": shutil.copytree(folder, f"{folder}-lost")}))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
