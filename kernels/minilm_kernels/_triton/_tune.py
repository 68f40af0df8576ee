"""Tuning by time, for who asks: each kernel that a call launches runs with every candidate, and the fastest stays.

Off by default, since other tiles mean other roundings: results then depend on what was fastest when it was measured.
"""

from collections.abc import Callable, Hashable

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import Kind, Tiles, architecture, padded, tiles

CANDIDATES = tuple(
    Tiles(block_m, block_n, num_warps, num_stages)
    for block_m, block_n, num_warps in (
        (64, 64, 4),
        (64, 128, 4),
        (128, 64, 4),
        (128, 64, 8),
        (128, 128, 8),
        (32, 64, 4),
    )
    for num_stages in (1, 2, 3)
)


class _State:
    tuning = False
    fastest: dict[Hashable, Tiles] = {}  # noqa: RUF012 (one state a process)


def planned(kernel: str, kind: Kind, build: Callable[[Tiles], Launch]) -> Launch:
    """The launch of "forward", "rows", "keys" or "self" with tuned tiles, or with the pinned ones."""
    pinned = tiles(kernel, kind, architecture(kind.device))
    if _State.tuning or _State.fastest:
        like = _like(kernel, kind)
        if _State.tuning and like not in _State.fastest:
            _State.fastest[like] = min(
                (pinned, *CANDIDATES), key=lambda candidate: _time(build(candidate), kind.device)
            )
        return build(_State.fastest.get(like, pinned))
    return build(pinned)


def tune(call: Callable[[], object]) -> dict[str, Tiles]:
    """See `minilm_kernels.tune`."""
    before = set(_State.fastest)
    _State.tuning = True
    try:
        call()
    finally:
        _State.tuning = False
    return {str(kind): found for kind, found in _State.fastest.items() if kind not in before}


def _like(kernel: str, kind: Kind) -> Hashable:
    """What the fastest tiles depend on: lengths count by powers of two."""
    sizes = padded(kind.d_t), padded(kind.d_s), padded(kind.shape[3])
    return kernel, *sizes, kind.dtype_t, kind.dtype_s, kind.masked, kind.precision, architecture(kind.device)


def _time(launch: Launch, device: torch.device) -> float:
    """Milliseconds, infinite for tiles that the chip has no room for."""
    try:
        return float(do_bench(lambda: launch.run(device), return_mode="median"))
    except OutOfResources:
        return float("inf")
