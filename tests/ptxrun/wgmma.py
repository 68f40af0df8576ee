"""Hopper's products of a warpgroup, four warps: wgmma.mma_async, with operands that shared memory holds.

A descriptor says where such an operand begins and how it is laid out (PTX manual, "matrix descriptor format"). Rows of
K-major operands, and columns of MN-major ones, stand in groups of eight, interleaved within 32, 64 or 128 bytes.

Executed where it is issued: nothing shows that is changed or read too early between that and its wait_group.
"""

import re

import numpy as np

from ptxrun import arithmetic as exact
from ptxrun.machine import WARP, Machine, Mask, Step
from ptxrun.program import Instruction, Program
from ptxrun.values import operand

GROUP = 4 * WARP
WHOLE_GROUP = -3  # what `Shared` keeps as reader
SWIZZLED_BYTES = (16, 128, 64, 32)  # by the descriptor's last two bits


def addresses(descriptor: np.ndarray, rows: int, mn_major: bool) -> np.ndarray:
    """(groups, rows, 16) addresses of an operand's numbers of two bytes; rows: those of A, or columns of B."""

    def field(bit: int) -> np.ndarray:
        return ((descriptor >> np.uint64(bit)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] << 4

    start, leading, stride = field(0), field(16), field(32)
    (width,) = {SWIZZLED_BYTES[mode] for mode in (descriptor >> np.uint64(62)).astype(int).tolist()}
    row, k = np.arange(rows)[:, None], np.arange(16)[None]
    if mn_major:
        of_row, of_k = (stride, leading) if width == 16 else (leading, stride)
        offset = row % (width // 2) * 2 + row // (width // 2) * of_row + k % 8 * width + k // 8 * of_k
    elif width == 16:
        offset = row % 8 * 16 + row // 8 * stride + k % 8 * 2 + k // 8 * leading
    else:
        offset = row % 8 * width + row // 8 * stride + k * 2
    place = start + offset
    return place ^ ((place >> 7) % (width // 16) << 4)


def wgmma(program: Program, x: Instruction) -> Step:
    if x.opcode[1] != "mma_async":  # fence, commit_group, wait_group
        return lambda machine, mask: machine.whole_warps(mask)
    shape = re.fullmatch(r"m64n(\d+)k16", x.opcode[4])
    assert shape, str(x)
    columns = int(shape.group(1))
    assert x.opcode[5:] in (("f32", "bf16", "bf16"), ("f32", "f16", "f16")), str(x)
    widen = exact.from_bfloat16 if x.opcode[6] == "bf16" else exact.from_float16
    d_names = [name.strip() for name in x.operands[0].strip("{}").split(",")]
    in_registers = x.operands[1].startswith("{")
    a_names = x.operands[1].strip("{}").split(",") if in_registers else [x.operands[1]]
    a = [operand(program, name.strip(), np.uint32 if in_registers else np.uint64) for name in a_names]
    b, adds = operand(program, x.operands[2], np.uint64), operand(program, x.operands[3], np.bool_)
    d = [operand(program, name, np.float32) for name in d_names]
    assert x.operands[4:6] == ("1", "1"), str(x)
    *a_major, b_major = (text == "1" for text in x.operands[6:])

    def from_memory(machine: Machine, lanes: np.ndarray, descriptor: np.ndarray, rows: int, major: bool) -> np.ndarray:
        first = lanes[:, 0]
        where = addresses(np.broadcast_to(descriptor, machine.lanes)[first], rows, major)
        slots = np.broadcast_to(machine.slot[first][:, None, None], where.shape).reshape(-1)
        readers = np.full(slots.size, WHOLE_GROUP, np.int16)
        return widen(machine.shared.load(slots, where.reshape(-1), readers, 2, 1)).reshape(where.shape)

    def multiply(machine: Machine, mask: Mask) -> None:
        lanes = machine.chosen(mask).reshape(-1, GROUP)
        groups = len(lanes)

        def of_lanes(value: np.ndarray) -> np.ndarray:
            """(groups, warp, g, t)"""
            return np.broadcast_to(value, machine.lanes)[lanes].reshape(groups, 4, 8, 4)

        if in_registers:  # registers are (half of k, half of the rows)
            words = np.stack([of_lanes(part(machine)) for part in a], -1)
            numbers = widen(words.view(np.uint16)).reshape(groups, 4, 8, 4, 2, 2, 2)
            left = numbers.transpose(0, 1, 5, 2, 4, 3, 6).reshape(groups, 64, 16)
        else:
            left = from_memory(machine, lanes, a[0](machine), 64, a_major[0])
        right = from_memory(machine, lanes, b(machine), columns, b_major).swapaxes(1, 2)
        # registers are (eight columns, half of the rows, number)
        before = np.stack([of_lanes(part(machine)) for part in d], -1).reshape(groups, 4, 8, 4, -1, 2, 2)
        before = before.transpose(0, 1, 5, 2, 4, 3, 6).reshape(groups, 64, columns)
        kept = np.broadcast_to(adds(machine), machine.lanes)[lanes[:, 0]][:, None, None]
        after = exact.multiply_tiles(left, right, np.where(kept, before, np.float32(0)))
        after = after.reshape(groups, 4, 2, 8, -1, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(d), -1)
        for name, values in zip(d_names, np.ascontiguousarray(after).view(np.uint32), strict=True):
            register = machine.registers[name].copy()
            register[lanes.reshape(-1)] = values
            machine.registers[name] = register

    return multiply
