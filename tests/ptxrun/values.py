"""Value instructions: each is a function of its operands, typed by the opcode's last word."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxrun import arithmetic as exact
from ptxrun.machine import Machine
from ptxrun.program import Instruction, Program

Value = Callable[[Machine], np.ndarray]
Lanes = Callable[..., np.ndarray]
TYPES = {
    "pred": np.bool_,
    **{
        f"{kind}{8 * n}": np.dtype(f"{letter}{n}")
        for n in (1, 2, 4, 8)
        for kind, letter in zip("bus", "uui", strict=True)
    },
    "f32": np.float32,
    "f64": np.float64,
}


def operand(program: Program, text: str, kind: Any) -> Value:
    """A register, a special register, the address behind a name or a number, as `kind`."""
    kind = np.dtype(kind)
    if text.startswith("-") and kind.kind == "f":
        positive = operand(program, text[1:], kind)
        return lambda machine: -positive(machine)
    if text in program.registers:
        if program.registers[text] == kind.itemsize:
            return lambda machine: machine.registers[text].view(kind)
        return lambda machine: machine.registers[text].astype(kind)  # a narrower type reads the low bits
    if text.startswith("%"):
        return lambda machine: machine.special[text].view(kind)
    number = np.array(program.symbols[text], kind) if text in program.symbols else _number(text, kind)
    return lambda machine: number


def _number(text: str, kind: np.dtype) -> np.ndarray:
    if text.startswith(("0f", "0F")):
        return np.array(int(text[2:], 16), np.uint32).view(kind)
    if text.startswith(("0d", "0D")):
        return np.array(int(text[2:], 16), np.uint64).view(kind)
    if kind == np.bool_:
        return np.array(text not in ("0", "false"))
    value = int(text.removesuffix("U"), 0) % (1 << 8 * kind.itemsize)
    return np.array(value, f"u{kind.itemsize}").view(kind)


def _elementwise(function: Lanes) -> Callable[[Program, Instruction], Value]:
    """All operands, and the result, of the opcode's last type."""

    def make(program: Program, x: Instruction) -> Value:
        kind = TYPES[x.opcode[-1]]
        operands = [operand(program, text, kind) for text in x.operands[1:]]
        if x.opcode[-1] == "f32" and "ftz" in x.opcode:
            return lambda machine: exact.flush(function(*[exact.flush(o(machine)) for o in operands]))
        return lambda machine: function(*[o(machine) for o in operands])

    return make


def _float_only(function: Lanes) -> Callable[[Program, Instruction], Value]:
    def make(program: Program, x: Instruction) -> Value:
        assert x.opcode[-1] == "f32"
        return _elementwise(function)(program, x)

    return make


def _min_max(for_floats: Lanes, for_integers: Lanes) -> Callable[[Program, Instruction], Value]:
    def make(program: Program, x: Instruction) -> Value:
        if x.opcode[-1] != "f32":
            return _elementwise(for_integers)(program, x)
        if "NaN" not in x.opcode:
            return _elementwise(for_floats)(program, x)
        nan = np.float32(np.nan)
        return _elementwise(lambda a, b: np.where(np.isnan(a) | np.isnan(b), nan, for_floats(a, b)))(program, x)

    return make


def _multiply(program: Program, x: Instruction) -> Value:
    """mul and mad, of floats, .lo, .hi and .wide."""
    kind = np.dtype(TYPES[x.opcode[-1]])
    a, b = (operand(program, text, kind) for text in x.operands[1:3])
    wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}") if kind.kind in "ui" and kind.itemsize < 8 else kind
    if kind.kind == "f":
        assert len(x.operands) == 3, "mad.f32"
        return _elementwise(np.multiply)(program, x)
    if "wide" in x.opcode:

        def product(machine: Machine) -> np.ndarray:
            return a(machine).astype(wide) * b(machine).astype(wide)

    elif "hi" in x.opcode:
        assert kind.itemsize < 8
        shift = wide.type(8 * kind.itemsize)

        def product(machine: Machine) -> np.ndarray:
            return (a(machine).astype(wide) * b(machine).astype(wide) >> shift).astype(kind)

    else:

        def product(machine: Machine) -> np.ndarray:
            return a(machine) * b(machine)

    if len(x.operands) == 3:
        return product
    c = operand(program, x.operands[3], wide if "wide" in x.opcode else kind)
    return lambda machine: product(machine) + c(machine)


def _divide(program: Program, x: Instruction) -> Value:
    if x.opcode[-1] == "f32":
        return _elementwise(exact.divide)(program, x)

    def towards_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
        return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)

    assert np.dtype(TYPES[x.opcode[-1]]).itemsize <= 4 or x.opcode[-1] == "s64"
    if x.opcode[0] == "rem":
        return _elementwise(lambda a, b: a - towards_zero(a, b) * b)(program, x)
    return _elementwise(towards_zero)(program, x)


def _shift(function: Lanes) -> Callable[[Program, Instruction], Value]:
    def make(program: Program, x: Instruction) -> Value:
        kind = np.dtype(TYPES[x.opcode[-1]])
        bits = 8 * kind.itemsize
        a, b = operand(program, x.operands[1], kind), operand(program, x.operands[2], np.uint32)

        def value(machine: Machine) -> np.ndarray:
            number, by = a(machine), b(machine)
            if by.ndim == 0 and by < bits:
                return function(number, by.astype(kind))
            sign = kind.kind == "i" and x.opcode[0] == "shr"
            clamped = np.minimum(by, bits - 1)
            shifted = function(number, clamped.astype(kind))
            return shifted if sign else np.where(by < bits, shifted, kind.type(0))

        return value

    return make


def _extract(program: Program, x: Instruction) -> Value:
    """bfe"""
    kind = np.dtype(TYPES[x.opcode[-1]])
    assert kind.itemsize == 4
    a = operand(program, x.operands[1], kind)
    start, length = (operand(program, text, np.uint32) for text in x.operands[2:])

    def value(machine: Machine) -> np.ndarray:
        first, count = start(machine) & np.uint32(255), length(machine) & np.uint32(255)
        assert (first + count <= 32).all()
        assert (count > 0).all()
        up = (32 - first - count).astype(kind)
        return (a(machine) << up) >> (32 - count).astype(kind)

    return value


def _compare(program: Program, x: Instruction) -> Value:
    kind, name = np.dtype(TYPES[x.opcode[-1]]), x.opcode[1]
    a, b = (operand(program, text, kind) for text in x.operands[1:3])
    unordered = kind.kind == "f" and len(name) == 3
    if name in ("num", "nan"):
        return lambda m: np.isnan(a(m)) | np.isnan(b(m)) ^ (name == "num")
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name[:2])
    function = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}.get(
        name, np.greater_equal
    )

    def compared(machine: Machine) -> np.ndarray:
        p, q = a(machine), b(machine)
        result = function(p, q)
        if kind.kind == "f" and (unordered or name == "ne"):
            either = np.isnan(p) | np.isnan(q)
            result = result | either if unordered else result & ~either
        return result

    if len(x.operands) == 3:
        return compared
    also = operand(program, x.operands[3], np.bool_)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[x.opcode[2]]
    return lambda machine: combine(compared(machine), also(machine))


def _select(program: Program, x: Instruction) -> Value:
    kind = TYPES[x.opcode[-1]]
    a, b = (operand(program, text, kind) for text in x.operands[1:3])
    chosen = operand(program, x.operands[3], np.bool_)
    return lambda machine: np.where(chosen(machine), a(machine), b(machine))


def _three_way_logic(program: Program, x: Instruction) -> Value:
    a, b, c = (operand(program, text, np.uint32) for text in x.operands[1:4])
    table = int(x.operands[4], 0)

    def value(machine: Machine) -> np.ndarray:
        inputs, result = (a(machine), b(machine), c(machine)), np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                wanted = [y if row >> place & 1 else ~y for y, place in zip(inputs, (2, 1, 0), strict=True)]
                result = result | wanted[0] & wanted[1] & wanted[2]
        return np.asarray(result)

    return value


def _permute(program: Program, x: Instruction) -> Value:
    a, b, selector = (operand(program, text, np.uint32) for text in x.operands[1:4])
    assert x.opcode == ("prmt", "b32")

    def value(machine: Machine) -> np.ndarray:
        both = a(machine).astype(np.uint64) | b(machine).astype(np.uint64) << np.uint64(32)
        result = np.zeros(machine.lanes, np.uint32)
        for place in range(4):
            nibble = (selector(machine) >> np.uint32(4 * place)).astype(np.uint64)
            byte = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            result = result | byte.astype(np.uint32) << np.uint32(8 * place)
        return result

    return value


def _convert(program: Program, x: Instruction) -> Value:
    to, source, modes = x.opcode[-2], x.opcode[-1], x.opcode[1:-2]
    assert set(modes) <= {"rn", "rzi", "ftz"}, str(x)
    if to in ("bf16x2", "f16x2"):
        narrow = exact.to_bfloat16 if to == "bf16x2" else exact.to_float16
        high, low = (operand(program, text, np.float32) for text in x.operands[1:])
        half = np.uint32(16)
        return lambda m: narrow(high(m)).astype(np.uint32) << half | narrow(low(m)).astype(np.uint32)
    special = {
        ("bf16", "f32"): (np.float32, exact.to_bfloat16),
        ("f16", "f32"): (np.float32, exact.to_float16),
        ("f32", "bf16"): (np.uint16, exact.from_bfloat16),
        ("f32", "f16"): (np.uint16, exact.from_float16),
    }
    if (to, source) in special:
        kind, function = special[to, source]
        a = operand(program, x.operands[1], kind)
        return lambda machine: function(a(machine))
    a = operand(program, x.operands[1], TYPES[source])
    kind = TYPES[to]
    return lambda machine: np.asarray(a(machine)).astype(kind)


def _negate(program: Program, x: Instruction) -> Value:
    kind = TYPES[x.opcode[-1]]
    a = operand(program, x.operands[1], kind)
    return lambda machine: -a(machine)


VALUES: dict[str, Callable[[Program, Instruction], Value]] = {
    "add": _elementwise(np.add),
    "sub": _elementwise(np.subtract),
    "and": _elementwise(np.bitwise_and),
    "or": _elementwise(np.bitwise_or),
    "xor": _elementwise(np.bitwise_xor),
    "not": _elementwise(np.invert),
    "abs": _elementwise(np.abs),
    "min": _min_max(exact.minimum, np.minimum),
    "max": _min_max(exact.maximum, np.maximum),
    "fma": _elementwise(exact.fma),
    "mul": _multiply,
    "mad": _multiply,
    "div": _divide,
    "rem": _divide,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _extract,
    "setp": _compare,
    "selp": _select,
    "lop3": _three_way_logic,
    "prmt": _permute,
    "cvt": _convert,
    "neg": _negate,
    "ex2": _float_only(exact.exp2),
    "lg2": _float_only(exact.log2),
    "rcp": _float_only(exact.reciprocal),
}
