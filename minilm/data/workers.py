"""Workers of a data loader that die, told where batches are taken.

When a worker dies, torch's handler of SIGCHLD raises a RuntimeError wherever the main thread is, in the middle of an
optimiser step or of a checkpoint. Here it is only noted, for the next time that a batch is asked for.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from minilm.data.faults import DataError


class WorkerDeaths:
    """While watched, a dead worker interrupts nothing; `check` raises."""

    def __init__(self) -> None:
        self._noted: str | None = None
        self._handler: Any = None

    def watch(self) -> None:
        """Takes over from torch's handler, which the first loader with workers has set."""
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._note and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGCHLD, self._note)

    def unwatch(self) -> None:
        """Gives torch's handler back."""
        if self._handler is not None:
            signal.signal(signal.SIGCHLD, self._handler)
            self._handler = None

    def check(self) -> None:
        """Raises `DataError` if a worker has died."""
        if self._noted is not None:
            raise _death(self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            self._noted = str(error)


@contextmanager
def worker_faults() -> Iterator[None]:
    """A death that torch finds while it waits for a batch, as `WorkerDeaths.check` raises it."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _death(str(error)) from error


def _death(message: str) -> DataError:
    what = " ".join(message.split()).rstrip(".")
    return DataError(f"{what}; if nobody did it, memory ran out: take fewer --dataloader_num_workers")
