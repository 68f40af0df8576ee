"""What the shell does to a run: streams without a reader, a disk that is full, poor encodings, SIGTERM."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from conftest import CommandLine

from minilm.cli.terminal import Terminated, patient_streams, sigterm_raises

SMALL = [
    *("--student_num_layers", "2", "--max_steps", "4", "--per_device_train_batch_size", "4", "--max_length", "12"),
    *("--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "--report_to", "none", "--output_dir", "out"),
]


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has gone, as stdout of `minilm-train | head -1` after a line."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


def test_a_run_whose_output_nobody_reads_saves_its_student(
    command: CommandLine, teacher: str, data: str, unread: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    monkeypatch.setattr(sys, "stderr", unread)
    code, _, _ = command("--teacher", teacher, "--data", data, *SMALL)
    assert code == 0
    assert {"model.safetensors", "metrics.json", "report.md"} <= set(os.listdir("out"))


def test_what_was_not_written_makes_no_error_at_the_end_either() -> None:
    """The interpreter flushes what its streams hold when it ends, and exits with 120 if it cannot."""
    code = "from minilm.cli.terminal import patient_streams\nwith patient_streams():\n    print('a line')"
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_streams_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with patient_streams():
        print("to nobody")


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with patient_streams():
        print("KL(p \u2016 q)", flush=True)
    assert written.getvalue() == b"KL(p \\u2016 q)\n"


def test_sigterm_is_an_exception_only_meanwhile() -> None:
    with pytest.raises(Terminated), sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["minilm.cli.arguments.parse", "minilm.cli.distill.load_inputs"])
def test_a_signal_before_training_is_one_line(
    command: CommandLine,
    teacher: str,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setattr(moment, lambda *_: os.kill(os.getpid(), number))
    ended, out, err = command("--teacher", teacher, "--data", data, *SMALL)
    assert (ended, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("minilm-train: error: ")
    assert not Path("out").exists()
