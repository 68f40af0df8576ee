"""PTX text as basic blocks of instructions.

One entry function a module, no calls, as Triton emits it.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

WIDTHS = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}
PARAMETERS_END = "end of the parameters"
_COMMENT = re.compile(r"//[^\n]*")
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{\n(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+(?:\.align\s+\d+\s+)?)?(\w+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>")
_GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)", re.DOTALL)


class Instruction(NamedTuple):
    opcode: tuple[str, ...]  # between the dots
    operands: tuple[str, ...]
    guard: str | None
    negated: bool

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.opcode)} {', '.join(self.operands)}"


@dataclass(frozen=True, eq=False)
class Program:
    name: str
    parameters: dict[str, str]  # name: type
    registers: dict[str, int]  # name: bytes
    threads: int
    blocks: list[list[Instruction]]  # each is entered at its first; only its last may be a branch or `ret`
    labels: dict[str, int]  # place among the blocks
    symbols: dict[str, int]  # addresses of the parameters, of their end, and of shared memory


def parse(ptx: str) -> Program:
    found = _ENTRY.search(_COMMENT.sub("", ptx))
    assert found, "no entry function"
    name, parameters, attributes, body = found.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", attributes)
    assert threads, "no number of threads"
    registers = {}
    for kind, prefix, count in _REGISTERS.findall(body):
        registers |= {f"{prefix}{i}": WIDTHS[kind] for i in range(int(count))}
    kinds = {parameter: kind for kind, parameter in _PARAMETER.findall(parameters)}
    symbols, end = {"global_smem": 0}, 0
    for parameter, kind in kinds.items():
        size = int(kind[1:]) // 8
        symbols[parameter] = -(-end // size) * size
        end = symbols[parameter] + size
    symbols[PARAMETERS_END] = -(-end // 16) * 16
    return Program(name, kinds, registers, int(threads.group(1)), *_blocks(body), symbols)


def _blocks(body: str) -> tuple[list[list[Instruction]], dict[str, int]]:
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    lines = (line for line in body.split("\n") if not re.match(r"\s*\.(loc|reg|pragma|file)\b", line))
    for statement in re.split(r";|(?<=:)\s*\n", "\n".join(lines)):
        statement = statement.strip()
        if statement.endswith(":"):
            if not statement.startswith(("$L__tmp", "$L__func")):  # those are for debuggers
                if blocks[-1]:
                    blocks.append([])
                labels[statement[:-1]] = len(blocks) - 1
        elif statement:
            instruction = _instruction(statement)
            blocks[-1].append(instruction)
            if instruction.opcode[0] in ("bra", "ret"):
                blocks.append([])
    return blocks, labels


def _instruction(statement: str) -> Instruction:
    guard, negated = None, False
    if guarded := _GUARD.match(statement):
        negated, guard, statement = bool(guarded.group(1)), guarded.group(2), guarded.group(3)
    opcode, _, rest = statement.partition(" ") if "\t" not in statement else statement.partition("\t")
    if " " in opcode:
        opcode, _, more = opcode.partition(" ")
        rest = more + rest
    operands = re.split(r",(?![^{\[]*[}\]])", rest)
    return Instruction(
        tuple(opcode.strip().split(".")), tuple(x.strip() for x in operands if x.strip()), guard, negated
    )
