"""The same steps in one micro-batch, in two, and on two ranks of three each."""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from processes import side_by_side

Step = Callable[[Path, int, int], None]  # its folder, batch and accumulation


def on_two_ranks(steps: Step, folder: Path, batch: int, accumulation: int) -> None:
    """As torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    side_by_side(*(partial(_on_rank, rank, port, steps, folder, batch, accumulation) for rank in range(2)))


def _on_rank(rank: int, port: int, steps: Step, *arguments: Path | int) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    steps(*arguments)  # type: ignore[arg-type]


def whole_halves_and_ranks(steps: Step, folder: Path, on_ranks: Step | None = None) -> list[Path]:
    """The folders that the three leave.

    Args:
        steps: takes them on twelve sequences.
        on_ranks: what takes them on the ranks, if it is something else.
    """
    on_two_ranks(on_ranks or steps, folder / "ranks", 2, 3)
    for name, batch, accumulation in (("whole", 12, 1), ("halves", 6, 2)):
        steps(folder / name, batch, accumulation)
    return [folder / name for name in ("whole", "halves", "ranks")]
