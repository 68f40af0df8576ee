"""Which structure a call gets, and with which tiles: pinned, so that results are the same bits from run to run.

- "resident": whole rows on chip; sums of short sequences with small heads, loss and gradients from one launch.
- "self": forward, then one sweep for the gradient of a self relation, where row and key see each other or neither does.
- "wide": forward, then a sweep for each gradient; heads too wide to hold.
- "cross": forward with dX, then a sweep for dY; everything else.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton

from minilm_kernels._relations import Relations

RESIDENT_DIM = 64
HELD_DIM = 128  # wider heads are read in parts
_TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])


@dataclass(frozen=True, eq=False)
class Problem:
    """What structure, tiles and constants of the launches depend on; one object for all relations with these fields."""

    shape: tuple[int, int, int, int]  # relations, B, R, N
    d_t: int
    d_s: int
    dtype_t: torch.dtype
    dtype_s: torch.dtype
    is_self: bool
    symmetric: bool
    reduces: bool
    weights_in_gradients: bool  # see `Relations`
    masked: bool
    precision: str  # of products of float32
    device: torch.device

    @cached_property
    def structure(self) -> str:
        tokens = resident_tokens(architecture(self.device), self.element_size)
        if self.reduces and self.shape[3] <= tokens and max(self.d_t, self.d_s) <= RESIDENT_DIM:
            return "resident"
        if self.is_wide:
            return "wide"
        return "self" if self.is_self and self.symmetric and self.reduces else "cross"

    @cached_property
    def is_wide(self) -> bool:
        return max(self.d_t, self.d_s) > HELD_DIM

    @cached_property
    def element_size(self) -> int:
        return max(self.dtype_t.itemsize, self.dtype_s.itemsize)

    @cached_property
    def lse_parts(self) -> tuple[int, int]:
        """Numbers of a row that make the teacher's and the student's probabilities of its scores, see `store_lse`."""
        if self.element_size > 2:
            return 2, 2
        return (2, 1) if self.is_self else (1, 1)


def problem_fields(relations: Relations) -> tuple[Any, ...]:
    x_t, x_s = relations.x_t[0], relations.x_s[0]
    batch, heads, length, d_s = x_s.shape
    dtype_t, dtype_s = x_t.dtype, x_s.dtype
    single = dtype_t == torch.float32 or dtype_s == torch.float32
    return (
        (len(relations.x_s), batch, heads, length),
        x_t.shape[3],
        d_s,
        dtype_t,
        dtype_s,
        relations.is_self,
        relations.symmetric,
        relations.reduces,
        relations.weights_in_gradients,
        relations.bounds is not None,
        "tf32" if single and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        x_s.device,
    )


known_problem = lru_cache(maxsize=1024)(Problem)


class Tiles(NamedTuple):
    block_m: int  # rows
    block_n: int  # keys
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread, so that more programs share a multiprocessor; NVIDIA only


# For 16-bit tensors, by compute capability, kernel, and the largest dimension that the tiles serve: the student's,
# which the accumulators have; a teacher's of up to 64 fits beside it. Those of 90 up to 64 dimensions are the fastest
# of bench/tile_bench.py on an H200; the others are chosen from compiled code, for no spills and the fewest instructions
# per element (bench/static_report.py).
_TILES: dict[int, dict[str, dict[int, Tiles]]] = {
    80: {
        "forward": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
        "rows": {32: Tiles(128, 64, 8, 2), 64: Tiles(64, 32, 4, 2), 128: Tiles(32, 64, 4, 2)},
        "keys": {32: Tiles(64, 64, 4, 3), 64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
        "self": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
    },
    90: {
        "forward": {
            16: Tiles(64, 64, 4, 3),
            32: Tiles(64, 64, 4, 3, 128),
            64: Tiles(64, 64, 4, 2, 128),
            128: Tiles(64, 64, 4, 2),
            1024: Tiles(128, 128, 8, 2),
        },
        "rows": {64: Tiles(64, 64, 4, 3, 168), 128: Tiles(128, 64, 8, 2)},
        "keys": {
            16: Tiles(32, 128, 4, 3),
            32: Tiles(64, 64, 4, 3, 128),
            64: Tiles(32, 64, 4, 3, 96),
            128: Tiles(64, 128, 8, 2),
        },
        "self": {
            16: Tiles(128, 32, 4, 3, 128),
            32: Tiles(64, 64, 4, 3, 128),
            64: Tiles(64, 64, 4, 3, 168),
            128: Tiles(128, 64, 8, 2),
        },
    },
    100: {
        "rows": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2)},
        "keys": {64: Tiles(64, 128, 4, 2)},
        "self": {64: Tiles(128, 64, 8, 2), 128: Tiles(64, 32, 4, 2)},
    },
}


@cache
def architecture(device: torch.device) -> int:
    """Row of the table: data-centre chips by their own, others by the one whose shared memory is as small."""
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def resident_tokens(architecture: int, element_size: int) -> int:
    """Longest sequence whose scores stay in registers: tensor cores that read operands from memory leave more."""
    if element_size > 2 or (architecture == 100 and _TRITON < (3, 8)):  # before 3.8, it fails to compile larger ones
        return 32
    return 128 if architecture >= 90 else 64


@lru_cache(maxsize=1024)
def persistent_programs(problem: Problem) -> int:
    """Programs that share the heads whose rows are on chip.

    On Hopper a head of more than 64 tokens has a multiprocessor to itself: one program for each of them walks over the
    heads, and loads the next beside the arithmetic of this one. Of heads of up to 16 dimensions two share it, under
    `resident_registers`, and eight programs for each were fastest. Shorter heads share a multiprocessor; on Blackwell
    the walk spills. There every head has its program.
    """
    heads = math.prod(problem.shape[:3])
    if not is_persistent(architecture(problem.device), problem.shape[3]):
        return heads
    each = 8 if max(problem.d_t, problem.d_s) <= 16 else 1
    return min(heads, each * torch.cuda.get_device_properties(problem.device).multi_processor_count)


def is_persistent(architecture: int, length: int) -> bool:
    """Whether programs take several heads whose rows are on chip; see `persistent_programs`."""
    return architecture == 90 and length > 64


def resident_registers(architecture: int, length: int, dim: int) -> int | None:
    """Most registers of a thread where whole rows are on chip: small heads share a multiprocessor by two."""
    return 128 if is_persistent(architecture, length) and dim <= 16 else None


def padded(dim: int) -> int:
    """tl.dot needs 16 and powers of two."""
    return max(16, 1 << (dim - 1).bit_length())


def held_dim(problem: Problem, dim: int) -> int:
    """Dimensions of a head that the score products hold at once: all of them, or a part where heads are wide."""
    part = 64 if problem.element_size == 2 else 32
    return min(padded(dim), part) if problem.is_wide else padded(dim)


def output_dim(problem: Problem) -> int:
    """Dimensions of a gradient that a program makes where heads are wide: what its registers can accumulate."""
    return min(padded(problem.d_s), 256)


@lru_cache(maxsize=1024)
def tiles(kernel: str, problem: Problem, architecture: int) -> Tiles:
    """Tiles of "forward" (rows without gradient), "rows", "keys", "self" or "wide"."""
    size = problem.element_size
    dim_t, dim_s = padded(problem.d_t), padded(problem.d_s)
    if size == 2:
        for dim, found in _TILES.get(architecture, {}).get(kernel, {}).items():
            if dim_s <= dim and dim_t <= max(dim, 64):
                return found
    dim = max(dim_t, dim_s)
    if problem.is_wide:
        return Tiles(32, 32, 8, 2) if size > 2 else Tiles(128, 64, 8, 2)
    if size > 2:  # true float32 multiplies without tensor cores, and its operands fill registers
        if dim <= 16:
            return Tiles(64, 32, 4, 2)
        return Tiles(16, 32, 4, 2) if kernel == "rows" and dim > 64 else Tiles(32, 32, 8, 2)
    return Tiles(64, 64, 4, 2)


def sweep_grid(problem: Problem, own: int, other: int) -> tuple[int, dict[str, Any]]:
    """Programs and constants of a sweep whose programs keep `own` tokens and meet tiles of `other` tokens."""
    count, batch, heads, length = problem.shape
    programs = triton.cdiv(length, own) * heads * batch * count
    return programs, size_constants(problem) | {"FILLED": length >= other, "TAIL": max(16, other // 2)}


def size_constants(problem: Problem) -> dict[str, Any]:
    """The sizes and constants of every kernel that multiplies scores."""
    _, batch, heads, length = problem.shape
    return {
        "B": batch,
        "R": heads,
        "N": length,
        "D_T": problem.d_t,
        "D_S": problem.d_s,
        "DIM_T": held_dim(problem, problem.d_t),
        "DIM_S": held_dim(problem, problem.d_s),
        "PRECISION": problem.precision,
    }
