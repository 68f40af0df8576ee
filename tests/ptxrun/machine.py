"""Runs a program on a grid: registers are arrays of lanes, all threads of some programs of the grid beside each other.

Lanes may part at branches. Those furthest back go first, so that they meet again where the paths do; a barrier must be
reached by all threads of a program of the grid at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ptxrun.memory import Fault, Memory, Shared
from ptxrun.program import PARAMETERS_END, Program

Mask = np.ndarray | None  # of lanes; None: all
Step = Callable[["Machine", Mask], None]
Block = list[tuple[Step, str | None, bool, str]]  # steps, the predicate of each and whether it is negated, its text
STORED: dict[int, Any] = {
    1: np.dtype("u2"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
}  # registers, by bytes
WARP = 32


class Schedule(NamedTuple):
    """What may differ from run to run and must not show."""

    lanes: int = 8192  # threads run beside each other
    garbage: int = 0xFF  # bytes of registers and shared memory that nothing was written to; 0xFF makes NaN
    backwards: bool = False  # whether the last programs of the grid run first


FIRST, OTHER = Schedule(), Schedule(lanes=1024, garbage=0x7B, backwards=True)


@dataclass
class Copy:
    """An asynchronous copy on its way to shared memory."""

    lanes: np.ndarray
    group: np.ndarray  # of each of these lanes, how many groups it had committed before
    addresses: np.ndarray
    values: np.ndarray


@dataclass
class Machine:
    program: Program
    memory: Memory
    shared: Shared
    parameters: np.ndarray  # bytes
    number: np.ndarray  # of each lane, which program of the grid it belongs to
    grid: int
    schedule: Schedule
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    def __post_init__(self) -> None:
        count, threads = self.number.size, self.program.threads
        self.lanes = count
        self.slot = np.arange(count) // threads  # which of the programs beside each other
        self.thread = (np.arange(count) % threads).astype(np.uint32)
        self.warp = (self.thread // WARP).astype(np.int16)
        self.groups = np.zeros(count, np.int64)  # asynchronous copies committed
        garbage = np.full(8 * count, self.schedule.garbage, np.uint8)
        by_size = {1: np.zeros(count, bool)} | {n: garbage[: n * count].view(f"u{n}") for n in (2, 4, 8)}
        self.registers = {name: by_size[size] for name, size in self.program.registers.items()}
        self.special = {
            "%tid.x": self.thread,
            "%ctaid.x": self.number.astype(np.uint32),
            "%nctaid.x": np.full(count, self.grid, np.uint32),
            "%ntid.x": np.full(count, threads, np.uint32),
            "%laneid": self.thread % np.uint32(WARP),
        }

    def write(self, name: str, value: np.ndarray, mask: Mask) -> None:
        if mask is not None:
            value = np.where(mask, value, self.registers[name])
        elif value.shape != (self.lanes,):
            value = np.full(self.lanes, value)
        self.registers[name] = value

    def chosen(self, mask: Mask) -> np.ndarray:
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask: Mask) -> None:
        if mask is not None:
            warps = mask.reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault("some threads of a warp are missing")

    def barrier(self, mask: Mask) -> None:
        if mask is not None:
            programs = mask.reshape(-1, self.program.threads)
            if (programs.any(1) != programs.all(1)).any():
                raise Fault("some threads are missing at a barrier")
            self.shared.barrier(programs.any(1))
        else:
            self.shared.barrier(slice(None))

    def run(self, blocks: list[Block]) -> None:
        done = len(blocks)
        self.next = np.zeros(self.lanes, np.int64)
        while (block := self.next.min()) < done:
            here = self.next == block
            mask = None if here.all() else here
            self.next[here] = block + 1
            for step, guard, negated, text in blocks[block]:
                active = mask
                if guard is not None:
                    active = ~self.registers[guard] if negated else self.registers[guard]
                    if mask is not None:
                        active = active & mask
                    if active.all():
                        active = None
                    elif not active.any():
                        continue
                try:
                    step(self, active)
                except Fault as fault:
                    raise Fault(f"{self.program.name}: {fault}: {text}") from None


def execute(
    program: Program,
    blocks: list[Block],
    memory: Memory,
    parameters: list[np.generic],
    grid: int,
    shared_bytes: int,
    schedule: Schedule,
) -> None:
    block = np.zeros(program.symbols[PARAMETERS_END], np.uint8)
    for name, value in zip(program.parameters, parameters, strict=True):
        at = program.symbols[name]
        block[at : at + value.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
    beside = max(1, schedule.lanes // program.threads)
    starts = range(0, grid, beside)
    with np.errstate(all="ignore"):
        for start in reversed(starts) if schedule.backwards else starts:
            numbers = np.arange(start, min(grid, start + beside), dtype=np.int32)
            shared = Shared(numbers.size, shared_bytes, schedule.garbage)
            number = np.repeat(numbers, program.threads)
            Machine(program, memory, shared, block, number, grid, schedule).run(blocks)
