#!/usr/bin/env python3
"""`minilm-train` in one process for an hour: memory and open files must not grow from round to round.

    python bench/soak.py                 an hour
    python bench/soak.py --minutes 5     shorter

A round is a run of the command with a tiny model, made here: streamed from two files by two workers, or indexed and
packed, evaluated and saved every few steps, stopped by SIGTERM half-way and continued from its checkpoint. After each
round one line of CSV: seconds, MiB of memory that is the process's own, open files, threads, child processes.
The first rounds warm up. Exit code 1 if a run fails, if afterwards files, threads or children become more, or if memory
grows by more than MIB_A_ROUND on average.
"""

import argparse
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainerCallback

from minilm.cli import distill, main
from minilm.training.trainer import DistillationTrainer

WARM_UP, MIB_A_ROUND = 4, 0.5
STEPS = 30
Held = tuple[float, int, int, int]  # MiB, open files, threads, children
RUN = [
    *("--student_num_layers", "2", "--max_length", "32", "--max_steps", str(STEPS), "--logging_steps", "5"),
    *("--per_device_train_batch_size", "8", "--eval_strategy", "steps", "--eval_steps", "10", "--save_steps", "7"),
    *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu"),
]
KINDS = (
    ["--streaming", "--shuffle_buffer", "64", "--dataloader_num_workers", "2"],
    ["--packing", "--dataloader_num_workers", "1"],
)


class _StopHalfWay(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS // 2 and not os.path.isdir(f"{args.output_dir}/checkpoint-{STEPS // 2}"):
            os.kill(os.getpid(), signal.SIGTERM)


def save_teacher(folder: Path) -> str:
    """Random weights, and a tokenizer of letters."""
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), num_hidden_layers=3, **sizes)).save_pretrained(folder)
    return str(folder)


def write_texts(path: Path, seed: int) -> str:
    draw = np.random.default_rng(seed)
    lines = ("".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), draw.integers(3, 30))) for _ in range(2000))
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def round_of(folder: Path, argv: list[str]) -> None:
    """A run that is stopped and continued. Raises `RuntimeError` if its exit codes are not those of one."""
    with tempfile.TemporaryDirectory(dir=folder) as output, Path(os.devnull).open("w") as nowhere:
        argv = [*argv, "--output_dir", f"{output}/out", "--resume_from_checkpoint", "auto"]
        with redirect_stdout(nowhere):
            codes = main(argv), main(argv)
    if codes != (128 + signal.SIGTERM, 0):
        raise RuntimeError(f"the exit codes of {argv} are {codes}")


def held() -> Held:
    """MiB, open files, threads and children of this process."""
    gc.collect()
    status = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    own = sum(int(line.split()[1]) for line in status if line.startswith(("Private_Clean", "Private_Dirty")))
    return own / 1024, len(os.listdir("/proc/self/fd")), threading.active_count(), len(active_children())


def soak(folder: Path, minutes: float) -> list[Held]:
    """What was held after each round."""
    teacher = save_teacher(folder / "teacher")
    data = [write_texts(folder / f"{seed}.txt", seed) for seed in range(2)]
    start = time.monotonic()
    rounds: list[Held] = []
    print("seconds,MiB,files,threads,children")
    while time.monotonic() - start < 60 * minutes or len(rounds) < WARM_UP + 2:
        round_of(folder, ["--teacher", teacher, "--data", *data, *RUN, *KINDS[len(rounds) % len(KINDS)]])
        rounds.append(held())
        mib, *counts = rounds[-1]
        print(f"{time.monotonic() - start:.0f},{mib:.1f},{','.join(map(str, counts))}", flush=True)
    return rounds


def growth(rounds: list[Held]) -> list[str]:
    """What has become more since the warm-up; the least of two rounds each, for both kinds of run."""
    warm = np.array(rounds[WARM_UP:])
    before, after = warm[:2].max(0), warm[-2:].min(0)
    more = [
        f"{name}: {one:.0f} -> {other:.0f}"
        for name, one, other in zip(("files", "threads", "children"), before[1:], after[1:], strict=True)
        if other > one
    ]
    a_round = np.polyfit(np.arange(len(warm)), warm[:, 0], 1)[0]
    return more + ([f"memory: {a_round:.2f} MiB a round"] if a_round > MIB_A_ROUND else [])


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    distill.SPEED_SECONDS = 0.05
    initialise = DistillationTrainer.__init__

    def stopping(self: Any, **options: Any) -> None:
        initialise(self, **options)
        self.add_callback(_StopHalfWay())

    DistillationTrainer.__init__ = stopping  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder + "/cache"
        rounds = soak(Path(folder), args.minutes)
    more = growth(rounds)
    print("; ".join(more) if more else f"nothing grew in {len(rounds)} rounds")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(_main())
