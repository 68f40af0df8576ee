"""A call of a command in a sandbox, and what is wrong with how it ended.

- a traceback, an exception that leaves `main`, a signal, an exit code other than 0, 1 and 2;
- code 1 or 2 without exactly one line of error, or with one that is a page, or that a terminal would obey;
- code 0, and nothing was done;
- a file written, changed or removed elsewhere than where the call was told to write, a program started, a connection
  made, code of the inputs run;
- more than LIMIT seconds.
"""

import contextlib
import io
import json
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import datasets
from hostile_inputs import CANARY, write_data, write_tasks
from tiny_models import tiny_model
from tiny_tasks import write_glue
from tiny_text import tiny_tokenizer, write_lines

from minilm import cli
from minilm.cli import augment, distill, evaluate
from minilm.evaluation import judged

LIMIT = 120.0  # seconds of a call; on a machine with nothing else to do the slowest take a few
MEMORY = 6 * 2**30
PAGE = 1200  # letters, of an error that is more than a sentence
TRACEBACK = "Traceback (most recent call last)"
TEACHERS = {"bert": "Model", "bert-lm": "ForMaskedLM", "bert-classifier": "ForSequenceClassification", "llama": "Model"}
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "minilm-train": cli.main,
    "minilm-eval": evaluate.main,
    "minilm-augment": augment.main,
}
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate")
_STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")


def _is_local(opened: object) -> bool:
    return isinstance(opened, socket.socket) and opened.family == socket.AF_UNIX


class Case(NamedTuple):
    """A call: which command, with what, and what is broken."""

    program: str
    argv: list[str]
    about: str

    def told_to_write(self) -> list[str]:
        pairs = zip(self.argv, self.argv[1:], strict=False)
        return [value for flag, value in pairs if flag in ("--output_dir", "--output")]


class Sandbox:
    """A folder with the inputs, which no call may change, and a folder for each call to run in."""

    def __init__(self, root: Path) -> None:
        self.root, self.inputs, self.here = root, root / "inputs", root / "here"
        write_data(self.inputs / "data")
        write_tasks(self.inputs / "tasks")
        write_glue(self.inputs / "tasks")
        write_lines(self.inputs / "good.txt")
        for name, head in TEACHERS.items():
            folder = self.inputs / name
            tiny_model(name.partition("-")[0], head, num_hidden_layers=2).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        self.data = sorted((self.inputs / "data").iterdir())
        self._before = self._state()

    def changed(self) -> list[str]:
        """Paths of inputs that were written, removed or made since this was asked before."""
        before, self._before = self._before, self._state()
        return sorted({path for path, _ in self._before ^ before})

    def _state(self) -> set[tuple[str, tuple[int, int]]]:
        found = set()
        for place, folders, names in os.walk(self.inputs):
            for name in [*folders, *names]:
                status = os.lstat(path := os.path.join(place, name))
                found.add((path, (status.st_size, status.st_mtime_ns)))
        return found


@contextlib.contextmanager
def sandbox() -> Iterator[Sandbox]:
    """With the caches and the temporary folder in it."""
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        for name in ("tmp", "cache"):
            (Path(root) / name).mkdir()
        stack.enter_context(patch.object(tempfile, "tempdir", f"{root}/tmp"))
        stack.enter_context(patch.object(datasets.config, "HF_DATASETS_CACHE", f"{root}/cache"))
        stack.enter_context(patch.object(distill, "SPEED_SECONDS", 0.01))
        stack.enter_context(patch.object(judged, "SECONDS", 0.01))
        yield Sandbox(Path(root))


def run(case: Case, box: Sandbox) -> tuple[str, list[str]]:
    """How a call ended, and its faults; in this process."""
    buffers = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(buffer, "utf-8", newline="\n", write_through=True) for buffer in buffers]
    faults: list[str] = []
    code: Any = None
    with contextlib.chdir(box.here), contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = MAINS[case.program](case.argv)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            faults.append(traceback.format_exc()[-1500:])
    out, err = (buffer.getvalue().decode("utf-8") for buffer in buffers)
    if not faults:
        faults += _faults(case, code, out, err, box)
    if changed := box.changed():
        faults.append(f"changed {changed[:3]}")
    if any(box.root.rglob(CANARY)):
        faults.append("code of the inputs was run")
    told = err.strip().splitlines() or out.strip().splitlines() or [""]
    return f"{code} {told[-1]}", faults


def _faults(case: Case, code: Any, out: str, err: str, box: Sandbox) -> Iterator[str]:
    if code not in (0, 1, 2):
        yield f"exit code {code!r}: {err[-300:]}"
    if TRACEBACK in err + out:
        yield f"a traceback: {err[-3000:]}"
    errors = re.findall(rf"^{case.program}: error: .*$", err, flags=re.MULTILINE)
    if len(errors) != (code != 0):
        yield f"{len(errors)} lines of error: {err[-1000:]}"
    for line in errors:
        if len(line) > PAGE:
            yield f"an error of {len(line)} letters: {line[:300]}"
        if not line.isprintable():
            yield f"an error with control characters: {line[:300]!r}"
        if not err.rstrip().endswith(line):
            yield f"more behind the error: {err[-1000:]}"
    if code == 0 and not _has_done(case, out, box):
        yield f"nothing was done: {out[-300:]}"


def _has_done(case: Case, out: str, box: Sandbox) -> bool:
    """Whether there is what a call that ended well leaves."""
    places = [box.here / place for place in case.told_to_write()]
    if case.program == "minilm-train":
        told = "A dry run: 3 steps were taken" in out or "minilm-v1-l12-h384 " in out  # --list_recipes
        return told or any((place / "metrics.json").is_file() for place in places)
    if case.program == "minilm-eval":
        return "| task " in out or any((place / "eval.json").is_file() for place in places)
    return any(place.is_file() and place.stat().st_size for place in places)


def fork_and_run(case: Case, box: Sandbox) -> tuple[str, list[str]]:
    """`run` in a process of its own, with limits of time and memory, where writes elsewhere show."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with open(box.root / "stderr", "wb") as file:
            os.dup2(file.fileno(), 2)
        elsewhere = _watch(box, case)
        ended, faults = run(case, box)
        sys.stderr.flush()
        foreign = (box.root / "stderr").read_text("utf-8", errors="replace")
        if TRACEBACK in foreign:
            faults.append(f"a traceback: {foreign[-2000:]}")
        os.write(writer, json.dumps([ended[:2000], [fault[:4000] for fault in [*faults, *elsewhere[:3]]]]).encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + LIMIT
    status = (0, 0)
    while time.monotonic() < deadline and not (status := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.002)
    if not status[0]:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        told = pipe.read()
    if not told:
        return "", [f"it took more than {LIMIT} seconds, or ended by signal {status[1] & 127}"]
    result, faults = json.loads(told)
    return result, faults


def _watch(box: Sandbox, case: Case) -> list[str]:
    """Names what is written, removed or started outside of the folders that a call may write to."""
    found: list[str] = []
    places = tuple(f"{box.root / name}/" for name in ("here", "tmp", "cache"))

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STARTS and not _is_local(arguments[0]):  # which workers of a data loader are
            found.append(f"{event} {arguments!r}"[:300])
        opens = event == "open" and len(arguments) > 2 and isinstance(arguments[2], int)
        writes = event in _CHANGES or (opens and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes or not isinstance(arguments[0], str | bytes):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        asked = any(path in place or path.startswith(place) for place in map(os.path.abspath, case.told_to_write()))
        if not (f"{path}/".startswith(places) or path == os.devnull or asked):
            found.append(f"{event} of {path}")

    sys.addaudithook(note)
    return found
