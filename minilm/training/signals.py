"""SIGTERM and Ctrl-C, noted while a training runs, so that it can end between two steps."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SIGNAL_SECONDS = 1.0


class Signals:
    """While entered, in the main thread, the first SIGTERM or SIGINT is only noted; the next acts as before."""

    def __init__(self) -> None:
        self.noted = 0
        self._since = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like want it ignored
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker: Ctrl-C reaches it too, its owner ends it by SIGTERM
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        elif not self.noted:
            self.noted, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
