"""The terminal and the shell around a run: errors of one line, streams that nobody reads, SIGTERM."""

import os
import signal
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

from minilm.escapes import printable
from minilm.values import LARGEST_INTEGER

LONGEST_ERROR = 1000  # letters


class OneLineErrors(ArgumentParser):
    """A parser whose errors are one line; argparse's own begin with the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(fail(self.prog, message, 2))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which takes `--flag=--` for an empty list, whatever the flag's type."""
        given = sys.argv[1:] if args is None else args
        if empty := next((argument for argument in given if argument.endswith("=--")), None):
            self.error(f"argument {empty.removesuffix('=--')}: '--' is no value")
        return super().parse_known_args(args, namespace)


def fail(program: str, message: str, code: int) -> int:
    """Says in one line of stderr why the program ends, and returns its exit code.

    The message may quote what a file or a name holds: a character that a terminal would obey is written as an escape,
    and of a long message the middle is left out.
    """
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST_ERROR:
        line = f"{line[: LONGEST_ERROR // 2]} [...] {line[-LONGEST_ERROR // 2 :]}"
    print(f"{program}: error: {line}", file=sys.stderr)
    return code


def positive(text: str) -> int:
    """An int of a flag, at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} is no number from 1 up")
    if int(text) > LARGEST_INTEGER:
        raise ArgumentTypeError(f"{text!r} is more than {LARGEST_INTEGER}")
    return int(text)


def not_installed(packages: Iterable[str], extra: str = "train") -> str | None:
    """Which of them are missing, and which extra of the project brings them."""
    missing = [name for name in packages if find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install 'fused-minilm[{extra}]'" if missing else None


class Terminated(BaseException):
    """SIGTERM, raised where the main thread is."""


@contextmanager
def patient_streams() -> Iterator[None]:
    """While entered, writing to stdout and stderr raises nothing.

    After `minilm-train | head -1`, or with the log's disk full, a run goes on and what it would print is lost. A
    character that the stream's encoding lacks is written as an escape.
    """
    streams = [_patient(stream) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                if stream is not None:
                    stream.flush()  # the interpreter, which does it else, would make an error of it


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """While entered, in the main thread, SIGTERM raises `Terminated` instead of ending the process without a word."""
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a process that was forked: its owner ends it so
        signal.raise_signal(number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _patient(stream: TextIO | None) -> TextIO | None:
    if stream is None:  # closed by the shell, as in `minilm-train >&-`
        return None
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return cast(TextIO, _Patient(stream))


class _Patient:
    """The stream, until it cannot be written to; then nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """What the stream still holds goes there too: the interpreter writes it out when it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
