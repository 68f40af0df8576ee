"""Reads NVIDIA machine code: registers, spills, and what the main loop issues per element."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[\w.]*\s*(.*?);")
_TENSOR = ("HGMMA", "UTCHMMA", "HMMA")


class Code(NamedTuple):
    registers: int
    spills: int  # loads and stores of local memory
    tensor_instruction: str | None
    issue: float | None  # warp instructions of the main loop per element and thread
    exponentials: float | None
    loads: float | None  # of global memory into registers: each waits where it stands


def read(cubin: bytes, elements: float, rounds: Sequence[int] = ()) -> Code:
    """What the machine code of a kernel says.

    Args:
        elements: of the score matrix that a thread works on in one pass of the main loop.
        rounds: of the loops with tensor-core instructions inside the main loop, where the compiler has left them loops.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        instructions = [
            (int(address, 16), name, operands)
            for line in _cuobjdump("-sass", file.name).splitlines()
            for address, name, operands in _INSTRUCTION.findall(line)
        ]
    counts = Counter(name for _, name, _ in instructions)
    loop = _main_loop(instructions, rounds)
    return Code(
        registers=max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        spills=counts["STL"] + counts["LDL"],
        tensor_instruction=next((name for name in _TENSOR if counts[name]), None),
        issue=round((sum(loop.values()) - loop["NOP"]) / elements, 2) if loop else None,
        exponentials=round(loop["MUFU"] / elements, 2) if loop else None,
        loads=round(loop["LDG"] / elements, 2) if loop else None,
    )


def _main_loop(instructions: list[tuple[int, str, str]], rounds: Sequence[int]) -> Counter[str] | None:
    """The first loop with tensor-core and exponential instructions: the unmasked one stands before the masked one."""
    inner: list[Counter[str]] = []
    for end, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target and int(target[1], 16) < end:
            start = int(target[1], 16)
            loop = Counter(name for address, name, _ in instructions if start <= address <= end)
            if not any(loop[tensor] for tensor in _TENSOR):
                continue
            if not loop["MUFU"]:
                inner.append(loop)
                continue
            for part, count in zip(inner, rounds if inner else (), strict=True):
                loop.update({name: times * (count - 1) for name, times in part.items()})
            return loop
    return None


def _cuobjdump(option: str, file: str) -> str:
    return subprocess.run([_CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout
