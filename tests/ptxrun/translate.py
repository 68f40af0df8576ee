"""Instructions as steps of the machine; which products become part of a sum."""

import re
from collections import Counter

import numpy as np

from ptxrun.effects import EFFECTS
from ptxrun.machine import STORED, Block, Machine, Mask, Step
from ptxrun.program import Instruction, Program
from ptxrun.values import VALUES


def translate(program: Program) -> list[Block]:
    return [[(_step(program, x), x.guard, x.negated, str(x)) for x in block] for block in _contracted(program)]


def _step(program: Program, x: Instruction) -> Step:
    if x.opcode[0] in EFFECTS:
        return EFFECTS[x.opcode[0]](program, x)
    if x.opcode[0] not in VALUES:
        raise NotImplementedError(str(x))
    value = VALUES[x.opcode[0]](program, x)
    target = x.operands[0]
    size = program.registers[target]
    stored = np.dtype(bool) if target.startswith("%p") else STORED[size]

    def step(machine: Machine, mask: Mask) -> None:
        result = value(machine)
        if result.dtype != stored:
            result = result.view(stored) if result.dtype.itemsize == stored.itemsize else result.astype(stored)
        machine.write(target, result, mask)

    return step


def _contracted(program: Program) -> list[list[Instruction]]:
    """Products of float32 that sums of the same block need, and nothing else does, become part of them.

    ptxas does so unless told not to; a product named `mul.rn` stays.
    """
    uses = Counter(name for block in program.blocks for x in block for name in _read(program, x))
    return [_contracted_block(program, block, uses) for block in program.blocks]


def _contracted_block(program: Program, instructions: list[Instruction], uses: Counter[str]) -> list[Instruction]:
    taken: dict[int, int] = {}  # place of a sum: place of the product that becomes part of it
    products: dict[str, int] = {}
    for place, x in enumerate(instructions):
        if x.opcode in (("add", "f32"), ("sub", "f32")):
            for term in x.operands[:0:-1]:
                if term in products and place not in taken:
                    taken[place] = products[term]
        for name in _written(program, x):
            for product, at in list(products.items()):
                if name in instructions[at].operands:
                    del products[product]
        if x.opcode == ("mul", "f32") and x.guard is None:
            products[x.operands[0]] = place
    served = Counter(taken.values())
    whole = {at for at, count in served.items() if count == uses[instructions[at].operands[0]]}
    result = []
    for place, x in enumerate(instructions):
        if place in whole:
            continue
        if taken.get(place) in whole:
            target, a, b = instructions[taken[place]].operands
            first, second = x.operands[1:]
            if second == target:
                a, other = ("-" + a if x.opcode[0] == "sub" else a), first
            else:
                other = "-" + second if x.opcode[0] == "sub" else second
            x = Instruction(("fma", "rn", "f32"), (x.operands[0], a, b, other), x.guard, x.negated)
        result.append(x)
    return result


def _names(program: Program, text: str) -> list[str]:
    return [name for name in re.findall(r"%\w+", text) if name in program.registers]


def _written(program: Program, x: Instruction) -> list[str]:
    return [] if x.opcode[0] in ("st", "bra", "bar", "cp") or not x.operands else _names(program, x.operands[0])


def _read(program: Program, x: Instruction) -> list[str]:
    sources = x.operands[1:] if _written(program, x) else x.operands
    return [name for text in sources for name in _names(program, text)] + ([x.guard] if x.guard else [])
