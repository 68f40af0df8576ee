"""Which of a run's ranks live: each has a pulse in the store through which they have found each other.

A rank that is killed, or that hangs, shows on the others as an error of the network in whatever they exchange next, at
once or when `--ddp_timeout` is over. Which rank it was the network's library does not say, but its pulse has stopped.
"""

import threading
import time
from datetime import timedelta
from typing import Any

from torch import distributed

BEAT_SECONDS, SILENT_SECONDS = 0.5, 4.0


class RankError(Exception):
    """Other ranks do not answer any more: one sentence with which, and what was kept."""


class Pulse:
    """While entered, this rank's pulse beats, in a thread of its own; nothing is done where there is one rank.

    Args:
        timeout: of what the ranks exchange. transformers does not pass it on to ranks without a GPU.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._ranks, self._stopped = 1, threading.Event()
        self._store: Any = None

    def __enter__(self) -> "Pulse":
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._ranks = distributed.get_world_size()
            if distributed.get_backend() == "gloo":
                distributed.distributed_c10d._set_pg_timeout(self._timeout)
            store: Any = distributed.distributed_c10d._get_default_store()
            self._store = store.clone()
            threading.Thread(target=self._beat, args=(distributed.get_rank(),), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _beat(self, rank: int) -> None:
        try:
            while not self._stopped.wait(BEAT_SECONDS):
                self._store.add(_key(rank), 1)
        except RuntimeError:  # the store is gone, and the ranks will notice
            return

    def silent(self) -> list[int]:
        """The ranks without a pulse, after `SILENT_SECONDS`; none too if the store does not answer."""
        try:
            before = self._counts()
            time.sleep(SILENT_SECONDS)
            return [rank for rank, (one, other) in enumerate(zip(before, self._counts(), strict=True)) if one == other]
        except RuntimeError:
            return []

    def _counts(self) -> list[int]:
        return [self._store.add(_key(rank), 0) for rank in range(self._ranks)]

    def what_ended(self, error: RuntimeError) -> str | None:
        """Who does not answer, if it is an error of what the ranks exchange; None for others."""
        if self._ranks == 1 or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            return None
        silent = self.silent()
        who = f"rank {', '.join(map(str, silent))}" if silent else "one or another"
        return f"of the {self._ranks} ranks {who} has ended, or does not answer any more"


def _key(rank: int) -> str:
    return f"minilm/pulse/{rank}"
