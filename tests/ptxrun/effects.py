"""Instructions that act on the machine: memory, matrices, shuffles between threads, barriers, branches."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxrun import arithmetic as exact
from ptxrun.machine import STORED, WARP, Copy, Machine, Mask, Step
from ptxrun.memory import Fault
from ptxrun.program import Instruction, Program
from ptxrun.values import TYPES, Value, operand
from ptxrun.wgmma import wgmma


def _parts(text: str) -> list[str]:
    return [item.strip() for item in text.strip("{} ").split(",")] if text.startswith("{") else [text]


def _address(program: Program, text: str, kind: Any) -> Value:
    base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
    start, more = operand(program, base, kind), np.dtype(kind).type(int(offset or "0", 0))
    return lambda machine: np.broadcast_to(start(machine) + more, machine.lanes)


def _move(program: Program, x: Instruction) -> Step:
    target, source = x.operands
    kind = np.dtype(TYPES[x.opcode[-1]])
    if source.startswith("{"):  # packed, the first lowest
        parts = [operand(program, text, f"u{kind.itemsize // len(_parts(source))}") for text in _parts(source)]
        bits = 8 * kind.itemsize // len(parts)

        def pack(machine: Machine, mask: Mask) -> None:
            value = np.zeros((), kind)
            for place, part in enumerate(parts):
                value = value | part(machine).astype(kind) << kind.type(bits * place)
            machine.write(target, value, mask)

        return pack
    value = operand(program, source, kind)
    targets = _parts(target)
    bits, part_kind = 8 * kind.itemsize // len(targets), np.dtype(f"u{kind.itemsize // len(targets)}")
    if len(targets) == 1:
        stored = kind if kind == np.bool_ else np.dtype(f"u{kind.itemsize}")
        return lambda machine, mask: machine.write(target, value(machine).view(stored), mask)

    def unpack(machine: Machine, mask: Mask) -> None:
        whole = value(machine)
        for place, name in enumerate(targets):
            if name != "_":
                machine.write(name, (whole >> kind.type(bits * place)).astype(part_kind), mask)

    return unpack


def _load(program: Program, x: Instruction) -> Step:
    kind, targets = np.dtype(TYPES[x.opcode[-1]]), _parts(x.operands[0])
    space = x.opcode[1]
    address = _address(program, x.operands[1], np.uint64 if space == "global" else np.uint32)
    assert space in ("global", "shared", "param")

    def load(machine: Machine, mask: Mask) -> None:
        lanes = machine.chosen(mask)
        where, size = address(machine)[lanes], kind.itemsize
        if space == "global":
            loaded = machine.memory.load(where, machine.number[lanes], size, len(targets))
        elif space == "param":
            loaded = machine.parameters.view(f"u{size}")[(where // size)[:, None] + np.arange(len(targets))]
        else:
            loaded = machine.shared.load(machine.slot[lanes], where, machine.warp[lanes], size, len(targets))
        for place, name in enumerate(targets):
            stored = STORED[program.registers[name]]
            words = loaded[:, place].view(kind).astype(f"{kind.kind}{stored.itemsize}").view(stored)
            if mask is None:
                machine.registers[name] = words
            else:
                value = machine.registers[name].copy()
                value[lanes] = words
                machine.registers[name] = value

    return load


def _store(program: Program, x: Instruction) -> Step:
    kind, space = np.dtype(TYPES[x.opcode[-1]]), x.opcode[1]
    address = _address(program, x.operands[0], np.uint64 if space == "global" else np.uint32)
    word = f"u{kind.itemsize}"
    values = [operand(program, text, word) for text in _parts(x.operands[1])]

    def store(machine: Machine, mask: Mask) -> None:
        lanes = machine.chosen(mask)
        words = np.stack([np.broadcast_to(value(machine), machine.lanes)[lanes] for value in values], 1)
        if space == "global":
            machine.memory.store(address(machine)[lanes], machine.number[lanes], words)
        else:
            machine.shared.store(machine.slot[lanes], address(machine)[lanes], machine.warp[lanes], words)

    return store


def _copy(program: Program, x: Instruction) -> Step:
    """cp.async: asynchronous copies, of zeros beyond the size to read; what arrives early is NaN."""
    if x.opcode[2] == "commit_group":

        def commit(machine: Machine, mask: Mask) -> None:
            machine.groups[machine.chosen(mask)] += 1

        return commit
    if x.opcode[2] in ("wait_group", "wait_all"):
        pending = int(x.operands[0], 0) if x.opcode[2] == "wait_group" else 0

        def wait(machine: Machine, mask: Mask) -> None:
            kept = []
            for copy in machine.copies:
                arrives = copy.group < machine.groups[copy.lanes] - pending
                if x.opcode[2] == "wait_all":
                    arrives[:] = True
                if mask is not None:
                    arrives &= mask[copy.lanes]
                _arrive(machine, copy, arrives)
                if not arrives.all():
                    kept.append(Copy(*(field[~arrives] for field in vars(copy).values())))
            machine.copies = kept

        return wait
    to, source = _address(program, x.operands[0], np.uint32), _address(program, x.operands[1], np.uint64)
    size = int(x.operands[2], 0)
    assert size in (4, 8, 16)
    assert x.opcode[2] == "ca" or size == 16
    read = operand(program, x.operands[3] if len(x.operands) > 3 else str(size), np.uint32)

    def copy(machine: Machine, mask: Mask) -> None:
        lanes = machine.chosen(mask)
        sizes = np.broadcast_to(read(machine), machine.lanes)[lanes]
        if not np.isin(sizes, (0, size)).all():
            raise Fault("part of a copy")
        values, full = np.zeros((lanes.size, size // 4), np.uint32), sizes > 0
        readers = lanes[full]
        values[full] = machine.memory.load(source(machine)[readers], machine.number[readers], 4, size // 4)
        where = to(machine)[lanes]
        machine.shared.store(machine.slot[lanes], where, machine.warp[lanes], np.full_like(values, 0xFFFFFFFF))
        machine.copies.append(Copy(lanes, machine.groups[lanes], where, values))

    return copy


def _arrive(machine: Machine, copy: Copy, which: np.ndarray) -> None:
    lanes = copy.lanes[which]
    machine.shared.store(machine.slot[lanes], copy.addresses[which], machine.warp[lanes], copy.values[which])


def _load_matrices(program: Program, x: Instruction) -> Step:
    """ldmatrix: 8x8 matrices of 16 bits; lane l holds two neighbours of row l/4, or of column l/4 if transposed."""
    targets = _parts(x.operands[0])
    assert "m8n8" in x.opcode
    assert x.opcode[-1] == "b16"
    assert f"x{len(targets)}" in x.opcode
    address, transposed = _address(program, x.operands[1], np.uint32), "trans" in x.opcode

    def load(machine: Machine, mask: Mask) -> None:
        machine.whole_warps(mask)
        lanes = machine.chosen(mask).reshape(-1, WARP)
        givers = lanes[:, : 8 * len(targets)].reshape(-1)
        rows = machine.shared.load(machine.slot[givers], address(machine)[givers], machine.warp[givers], 2, 8)
        matrices = rows.reshape(-1, len(targets), 8, 8)  # warp, matrix, row, column
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(targets), WARP)
        for place, name in enumerate(targets):
            value = machine.registers[name].copy()
            value[lanes.reshape(-1)] = words[:, place].reshape(-1)
            machine.registers[name] = value

    return load


def _store_matrices(program: Program, x: Instruction) -> Step:
    """stmatrix: what ldmatrix would load, stored."""
    sources = [operand(program, text, np.uint32) for text in _parts(x.operands[1])]
    assert "m8n8" in x.opcode
    assert x.opcode[-1] == "b16"
    address, transposed = _address(program, x.operands[0], np.uint32), "trans" in x.opcode

    def store(machine: Machine, mask: Mask) -> None:
        machine.whole_warps(mask)
        lanes = machine.chosen(mask).reshape(-1, WARP)
        givers = lanes[:, : 8 * len(sources)].reshape(-1)
        words = np.stack([np.broadcast_to(source(machine), machine.lanes)[lanes] for source in sources], 1)
        matrices = words.view(np.uint16).reshape(-1, len(sources), 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8)
        machine.shared.store(machine.slot[givers], address(machine)[givers], machine.warp[givers], rows)

    return store


def _multiply_matrices(program: Program, x: Instruction) -> Step:
    """mma.sync of 16x8 results; lane l = 4 g + t holds rows g and g + 8 of A and columns g of B."""
    shape, kind = x.opcode[3], x.opcode[7]
    assert x.opcode[4:7] == ("row", "col", "f32")
    assert x.opcode[9] == "f32"
    assert x.opcode[8] == kind
    assert (shape, kind) in {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")}
    d = _parts(x.operands[0])
    a, b = ([operand(program, text, np.uint32) for text in _parts(x.operands[i])] for i in (1, 2))
    c = [operand(program, text, np.float32) for text in _parts(x.operands[3])]

    def numbers(machine: Machine, parts: list[Value]) -> np.ndarray:
        """(registers, warps, g, t, numbers in a register)"""
        words = np.stack([np.broadcast_to(part(machine), machine.lanes) for part in parts])
        if kind == "tf32":
            return (words & np.uint32(0xFFFFE000)).view(np.float32).reshape(len(parts), -1, 8, 4, 1)
        widen = exact.from_bfloat16 if kind == "bf16" else exact.from_float16
        return widen(words.view(np.uint16)).reshape(len(parts), -1, 8, 4, 2)

    def multiply(machine: Machine, mask: Mask) -> None:
        machine.whole_warps(mask)
        of_a, of_b = numbers(machine, a), numbers(machine, b)
        warps, k = of_a.shape[1], 8 * of_a.shape[-1]
        # A: registers are (half of k, half of m); to warp, half of m, g, half of k, t, number
        left = of_a.reshape(2, 2, warps, 8, 4, -1).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, k)
        right = of_b.transpose(1, 0, 3, 4, 2).reshape(warps, k, 8)  # half of k, t, number; g
        before = np.stack([np.broadcast_to(part(machine), machine.lanes) for part in c])
        # C: registers are (half of m, number)
        before = before.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        after = exact.multiply_tiles(left, right, before)
        after = after.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, machine.lanes)
        for name, value in zip(d, np.ascontiguousarray(after).view(np.uint32), strict=True):
            machine.write(name, value, mask)

    return multiply


def _shuffle(program: Program, x: Instruction) -> Step:
    target, *predicate = x.operands[0].split("|")
    mode, (a, b, clamp, members) = x.opcode[2], x.operands[1:]
    assert not predicate
    assert int(clamp, 0) == 31
    assert int(members, 0) in (-1, 0xFFFFFFFF)
    value, by = operand(program, a, np.uint32), operand(program, b, np.uint32)

    def shuffle(machine: Machine, mask: Mask) -> None:
        machine.whole_warps(mask)
        lane = machine.thread % np.uint32(WARP)
        source = {"bfly": lambda: lane ^ by(machine), "idx": lambda: by(machine) & np.uint32(31)}[mode]()
        at = (np.arange(machine.lanes) // WARP * WARP) + source
        machine.write(target, np.broadcast_to(value(machine), machine.lanes)[at], mask)

    return shuffle


def _reduce(program: Program, x: Instruction) -> Step:
    """redux.sync"""
    kind, function = TYPES[x.opcode[-1]], {"min": np.min, "max": np.max, "add": np.sum}[x.opcode[2]]
    value, members = operand(program, x.operands[1], kind), operand(program, x.operands[2], np.int32)

    def reduce(machine: Machine, mask: Mask) -> None:
        machine.whole_warps(mask)
        assert (members(machine) == -1).all()
        warps = np.broadcast_to(value(machine), machine.lanes).reshape(-1, WARP)
        machine.write(x.operands[0], np.repeat(function(warps, 1).astype(kind), WARP).view(np.uint32), mask)

    return reduce


def _barrier(program: Program, x: Instruction) -> Step:
    if x.opcode[1] == "warp":
        return lambda machine, mask: machine.whole_warps(mask)
    assert x.opcode == ("bar", "sync")
    assert x.operands == ("0",)
    return lambda machine, mask: machine.barrier(mask)


def _branch(program: Program, x: Instruction) -> Step:
    place = program.labels[x.operands[0]]

    def branch(machine: Machine, mask: Mask) -> None:
        machine.next[machine.chosen(mask)] = place

    return branch


def _return(program: Program, x: Instruction) -> Step:
    end = len(program.blocks)

    def finish(machine: Machine, mask: Mask) -> None:
        machine.next[machine.chosen(mask)] = end

    return finish


EFFECTS: dict[str, Callable[[Program, Instruction], Step]] = {
    "mov": _move,
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "mma": _multiply_matrices,
    "wgmma": wgmma,
    "fence": lambda program, x: lambda machine, mask: None,
    "shfl": _shuffle,
    "redux": _reduce,
    "bar": _barrier,
    "bra": _branch,
    "ret": _return,
}
