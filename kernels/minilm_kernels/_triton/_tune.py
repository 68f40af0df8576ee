"""Tuning by time, for who asks: each kernel that a call launches runs with every candidate, and the fastest stays.

Off by default, since other tiles mean other roundings: results then depend on what was fastest when it was measured.
"""

from collections.abc import Callable, Hashable

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from minilm_kernels._relations import Relations
from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import Tiles, architecture, padded, tiles

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


def planned(kernel: str, relations: Relations, build: Callable[[Tiles], Launch]) -> Launch:
    """The launch of "forward", "rows", "keys" or "self" with tuned tiles, or with the pinned ones."""
    device = relations.x_s[0].device
    if _State.tuning or _State.fastest:
        kind = _kind(kernel, relations)
        if _State.tuning and kind not in _State.fastest:
            pinned = tiles(kernel, relations, architecture(device))
            _State.fastest[kind] = min((pinned, *CANDIDATES), key=lambda candidate: _time(build(candidate), device))
        if kind in _State.fastest:
            return build(_State.fastest[kind])
    return build(tiles(kernel, relations, architecture(device)))


def tune(call: Callable[[], object]) -> dict[str, Tiles]:
    """See `minilm_kernels.tune`."""
    before = set(_State.fastest)
    _State.tuning = True
    try:
        call()
    finally:
        _State.tuning = False
    return {str(kind): found for kind, found in _State.fastest.items() if kind not in before}


def _kind(kernel: str, relations: Relations) -> Hashable:
    """What tiles depend on: lengths count by powers of two."""
    x_t, x_s = relations.x_t[0], relations.x_s[0]
    masked = relations.bounds is not None
    return kernel, padded(x_t.shape[3]), padded(x_s.shape[3]), padded(x_s.shape[2]), x_t.dtype, x_s.dtype, masked


def _time(launch: Launch, device: torch.device) -> float:
    """Milliseconds, infinite for tiles that the chip has no room for."""
    try:
        return float(do_bench(lambda: launch.run(device), return_mode="median"))
    except OutOfResources:
        return float("inf")
