"""Which structure a call gets, and with which tiles: pinned, so that results are the same bits from run to run.

- "resident": whole rows on chip; sums of short sequences with small heads, loss and gradients from one launch.
- "self": forward, then one sweep for the gradient of a self relation, where row and key see each other or neither does.
- "cross": forward with dX, then a sweep for dY; everything else.
"""

from typing import Any, NamedTuple

import torch
import triton

from minilm_kernels._relations import Relations

RESIDENT_DIM = 64
_TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])


class Tiles(NamedTuple):
    block_m: int  # rows
    block_n: int  # keys
    num_warps: int
    num_stages: int


# For 16-bit tensors, by compute capability, kernel, and the largest dimension that the tiles serve: the student's,
# which the accumulators have; a teacher's of up to 64 fits beside it. Chosen from compiled code, for no spills and the
# fewest instructions per element (bench/static_report.py); not yet by time.
_TILES: dict[int, dict[str, dict[int, Tiles]]] = {
    80: {
        "forward": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
        "rows": {32: Tiles(64, 64, 4, 2), 64: Tiles(64, 32, 4, 2), 128: Tiles(32, 64, 4, 2)},
        "keys": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
        "self": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
    },
    90: {
        "forward": {64: Tiles(128, 128, 8, 2)},
        "rows": {64: Tiles(128, 128, 8, 2), 128: Tiles(64, 32, 4, 2)},
        "keys": {64: Tiles(64, 128, 4, 2), 128: Tiles(64, 128, 8, 2)},
        "self": {32: Tiles(128, 64, 4, 2), 64: Tiles(128, 128, 8, 2), 128: Tiles(128, 64, 8, 2)},
    },
    100: {
        "rows": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
        "keys": {64: Tiles(64, 128, 4, 2)},
        "self": {32: Tiles(128, 128, 8, 2), 64: Tiles(128, 64, 8, 2), 128: Tiles(64, 32, 4, 2)},
    },
}


def architecture(device: torch.device) -> int:
    """Row of the table: data-centre chips by their own, others by the one whose shared memory is as small."""
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def structure(relations: Relations) -> str:
    x_t, x_s = relations.x_t[0], relations.x_s[0]
    tokens = resident_tokens(architecture(x_s.device), max(x_t.element_size(), x_s.element_size()))
    if relations.sums and x_s.shape[2] <= tokens and max(x_t.shape[3], x_s.shape[3]) <= RESIDENT_DIM:
        return "resident"
    return "self" if relations.is_self and relations.symmetric and relations.sums else "cross"


def resident_tokens(architecture: int, element_size: int) -> int:
    """Longest sequence whose scores stay in registers: tensor cores that read operands from memory leave more."""
    if element_size > 2 or (architecture == 100 and _TRITON < (3, 8)):  # before 3.8, it fails to compile larger ones
        return 32
    return 128 if architecture >= 90 else 64


def padded(dim: int) -> int:
    """tl.dot needs 16 and powers of two."""
    return max(16, 1 << (dim - 1).bit_length())


def tiles(kernel: str, relations: Relations, architecture: int) -> Tiles:
    """Tiles of "forward" (rows without gradient), "rows", "keys" or "self"."""
    x_t, x_s = relations.x_t[0], relations.x_s[0]
    size = max(x_t.element_size(), x_s.element_size())
    dim_t, dim_s = padded(x_t.shape[3]), padded(x_s.shape[3])
    if size == 2:
        for dim, found in _TILES.get(architecture, {}).get(kernel, {}).items():
            if dim_s <= dim and dim_t <= max(dim, 64):
                return found
    dim = max(dim_t, dim_s)
    if size > 2:  # true float32 multiplies without tensor cores, and its operands fill registers
        if dim <= 16:
            return Tiles(64, 32, 4, 2)
        if dim <= (64 if kernel == "rows" else 128):
            return Tiles(32, 32, 8, 2)
        return Tiles(16, 32 if dim <= 128 else 16, 4, 2)
    block = 64 if dim <= 128 else 32
    return Tiles(block, block, 4, 2)


def dimensions(relations: Relations) -> dict[str, Any]:
    """The constants of every kernel that multiplies scores."""
    d_t, d_s = relations.x_t[0].shape[3], relations.x_s[0].shape[3]
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D_T": d_t,
        "D_S": d_s,
        "DIM_T": padded(d_t),
        "DIM_S": padded(d_s),
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def lse_parts(relations: Relations) -> int:
    """Numbers that hold the logarithm of a softmax sum: in float32 one would round away what eager code keeps."""
    return 2 if torch.float32 in (relations.x_t[0].dtype, relations.x_s[0].dtype) else 1
