"""What goes wrong with data while a run trains: a checkpoint of the last step, one line, exit code 1."""

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from tiny_text import lines, write_lines
from transformers import TrainerCallback

from minilm.data.files import Chosen, choose_files
from minilm.training.trainer import DistillationTrainer

RUN = [
    *("--student_num_layers", "2", "--max_length", "12", "--per_device_train_batch_size", "4", "--use_cpu"),
    *("--disable_tqdm", "true", "--output_dir", "out", "--max_steps", "40", "--streaming", "--shuffle_buffer", "8"),
]
CONTINUED = (
    r"; a checkpoint of step (\d+) was saved, from which --resume_from_checkpoint auto continues on the same data\n"
)


class At(TrainerCallback):
    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act()


def act_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    initialise = DistillationTrainer.__init__

    def with_callback(self: Any, **options: Any) -> None:
        initialise(self, **options)
        self.add_callback(At(step, act))

    monkeypatch.setattr(DistillationTrainer, "__init__", with_callback)


def fullmatch(pattern: str, text: str) -> Any:
    match = re.fullmatch(pattern, text)
    assert match, text
    return match


def spoiling(spoil: Callable[[], None]) -> Any:
    """The Trainer's loader, made after the data changed that the start has read."""
    original = DistillationTrainer.get_train_dataloader

    def get(self: Any) -> Any:
        spoil()
        return original(self)

    return get


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_row_that_cannot_be_read_ends_a_run_after_a_checkpoint(
    command: CommandLine, teacher: str, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    file = write_lines(Path("lines.txt"), 400)

    def spoil() -> None:
        content = [line.encode() for line in lines(400)]
        content[40] = b"\xe9" + content[40][1:]
        file.write_bytes(b"\n".join(content) + b"\n")

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "get_train_dataloader", spoiling(spoil))
        code, _, err = command("--teacher", teacher, "--data", "lines.txt", "--dataloader_num_workers", workers, *RUN)
    assert code == 1
    match = fullmatch(
        r"minilm-train: error: cannot read 'lines.txt' at row 41: the byte 0xe9 is not UTF-8; convert the file, for "
        rf"example by iconv -f latin1 -t utf-8; --on_bad_record skip passes over such rows{CONTINUED}",
        err,
    )
    assert [path.name for path in Path("out").iterdir()] == [f"checkpoint-{match[1]}"]
    write_lines(file, 400)
    again = ("--resume_from_checkpoint", "auto", "--max_steps", "12")
    code, out, err = command(
        "--teacher", teacher, "--data", "lines.txt", "--dataloader_num_workers", workers, *RUN, *again
    )
    assert (code, err) == (0, "")
    assert f"continued after step {match[1]}" in out


def test_a_worker_that_is_killed_is_told_as_such(
    command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    act_at(monkeypatch, 3, kill)
    code, _, err = command("--teacher", teacher, "--data", data, "--dataloader_num_workers", "1", *RUN)
    assert code == 1
    match = fullmatch(rf"minilm-train: error: DataLoader worker \(pid.* \d+\) .*; if nobody did it, .*{CONTINUED}", err)
    assert match[1] == "3"
    assert Path("out/checkpoint-3").is_dir()
    assert getattr(signal.getsignal(signal.SIGCHLD), "__name__", None) == "handler"  # torch's again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shuffle_buffer", "0"], "--shuffle_buffer is 0: it must be at least 1"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers is -1: it must not be negative"),
        (
            ["--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "0"],
            "--dataloader_prefetch_factor is 0: it must be at least 1",
        ),
        (["--data", ""], "--data is empty: give it a value, or leave it out"),
    ],
)
def test_wrong_values_are_one_line_before_work(
    command: CommandLine, teacher: str, data: str, flags: list[str], message: str
) -> None:
    code, _, err = command("--teacher", teacher, "--data", data, *RUN, *flags)
    assert (code, err) == (2, f"minilm-train: error: {message}\n")


def test_of_a_folder_it_is_said_what_was_read(command: CommandLine, teacher: str) -> None:
    Path("texts").mkdir()
    write_lines(Path("texts/train.txt"), 40)
    write_lines(Path("texts/test.txt"), 40)
    code, out, err = command("--teacher", teacher, "--data", "texts", *RUN, "--max_steps", "2")
    assert (code, err) == (0, "")
    assert "12 tokens; of texts: read train.txt, left out test.txt\n" in out


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_folder_of_data_is_listed_once(
    command: CommandLine, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    write_lines(tmp_path / "texts" / "a.txt")
    listed: list[Path] = []

    def choose(folder: Path) -> Chosen:
        listed.append(folder)
        return choose_files(folder)

    monkeypatch.setattr("minilm.data.texts.choose_files", choose)
    flags = ["--teacher", teacher, "--data", "texts", "--output_dir", "out", "--student_num_layers", "1"]
    code, _, err = command(*flags, "--max_steps", "1", "--dry_run", *streaming)
    assert (code, listed) == (0, [Path("texts")]), err
