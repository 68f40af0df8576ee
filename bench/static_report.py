"""What the compiler made of every kernel, for GPUs that need not be there: registers, spills, instructions per element.

    python bench/static_report.py [--target sm_90 ...] [--dtype bfloat16 ...] [--out bench/results]

Compiles the kernels with their pinned tiles for sm_80, sm_89, sm_90, sm_100 and gfx942, and reads registers, spills and
the main loop from the machine code (NVIDIA only; an element is one pair of tokens of one head). Main loops with neither
bounds nor tails are counted. Writes static_report.csv; nothing here is a time.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import _sass
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from minilm_kernels._relations import Relations
from minilm_kernels._triton._keys import key_launch
from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import Problem, is_persistent, problem_fields, resident_tokens, tiles
from minilm_kernels._triton._resident import resident_launch
from minilm_kernels._triton._rows import row_launch
from minilm_kernels._triton._self import self_launch

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DIMENSIONS = ((16, 8), (64, 32), (64, 64), (128, 128))  # of teacher and student
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BATCH, HEADS, LENGTH = 32, 12, 512


class Variant(NamedTuple):
    """One kernel as a call with these dimensions launches it."""

    kernel: str  # forward, rows, keys, self, resident
    d_t: int
    d_s: int
    dtype: torch.dtype
    bounded: bool  # with a mask that may have holes


class Row(NamedTuple):
    """A line of the report; instructions per element of the main loop, None without one or without a disassembler."""

    target: str
    kernel: str
    d_t: int
    d_s: int
    dtype: str
    bounded: bool
    tiles: str
    registers: int | None
    spills: int | None
    shared_bytes: int
    tensor_instruction: str | None
    issue: float | None
    exponentials: float | None
    loads: float | None


def variants(dtypes: Sequence[torch.dtype]) -> Iterator[Variant]:
    for dtype in dtypes:
        for d_t, d_s in DIMENSIONS:
            for kernel in ("forward", "rows", "keys", "self", "resident"):
                if kernel == "resident" and d_t > 64:
                    continue
                for bounded in (False, True):
                    yield Variant(kernel, d_t, d_s, dtype, bounded)


def launch(variant: Variant, architecture: int) -> Launch:
    """The launch that a call on such a GPU would make, over tensors without storage."""

    resident_length = resident_tokens(architecture, variant.dtype.itemsize)
    length = resident_length if variant.kernel == "resident" else LENGTH

    def heads(dim: int) -> torch.Tensor:
        shape = (BATCH, length, HEADS, dim)
        return torch.empty(shape, dtype=variant.dtype, device="meta").transpose(1, 2)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    is_self = variant.kernel in ("forward", "self")
    relations = Relations(
        [heads(variant.d_t)],
        [] if is_self else [heads(variant.d_t)],
        [heads(variant.d_s)],
        [] if is_self else [heads(variant.d_s)],
        numbers(4, BATCH, length, dtype=torch.int32) if variant.bounded else None,
        numbers(BATCH, dtype=torch.int32) if variant.bounded else None,
        numbers(BATCH, length) if variant.bounded else None,
        1.0 / length,
        [1.0],
        variant.d_t**-0.5,
        variant.d_s**-0.5,
        symmetric=True,
        reduces=True,
    )
    problem = Problem(*problem_fields(relations))
    lse = numbers(problem.lse_parts, *problem.shape)
    dx, dy = [torch.empty_like(x) for x in relations.x_s], [torch.empty_like(y) for y in relations.y_s]
    grad = numbers()
    pinned = tiles(variant.kernel, problem, architecture)
    if variant.kernel == "forward":
        return row_launch(relations, problem, lse, lse, [], pinned)
    if variant.kernel == "rows":
        return row_launch(relations, problem, lse, lse, dx, pinned)
    if variant.kernel == "keys":
        return key_launch(relations, problem, lse, lse, grad, dx, dy, pinned)
    if variant.kernel == "self":
        bases, factors = [lse[0, ..., 0]] * 2, [lse[0]] * 2
        return self_launch(relations, problem, lse, lse, bases, factors, grad, dx, pinned)
    programs = 1 if is_persistent(architecture, length) else math.prod(problem.shape[:3])
    return resident_launch(relations, problem, dx, dy, programs, architecture)


class _Pointer:
    """Stands for a tensor where only its type and alignment are asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0


def _without_storage(argument: object) -> object:
    if isinstance(argument, torch.Tensor):
        return _Pointer(argument.dtype)
    return tuple(_without_storage(a) for a in argument) if isinstance(argument, tuple) else argument


def compile_for(target: GPUTarget, call: Launch) -> CompiledKernel:
    """The kernel as Triton would compile it at this launch."""
    backend = make_backend(target)
    options = call.options
    bind = create_function_from_signature(call.kernel.signature, call.kernel.params, backend)
    arguments = {name: _without_storage(value) for name, value in call.arguments.items()}
    bound, specialization, chosen = bind(**arguments, **options)
    parsed, signature, constants, attributes = call.kernel._pack_args(backend, options, bound, specialization, chosen)
    source = ASTSource(call.kernel, signature, constants, attributes)
    return compile(source, target=target, options=parsed.__dict__)


def measure(name: str, variant: Variant) -> Row:
    target = TARGETS[name]
    call = launch(variant, {90: 90, 100: 100}.get(target.arch, 80))
    compiled = compile_for(target, call)
    constants = call.arguments
    cap = f" r{call.max_registers}" if call.max_registers else ""
    tiles = [constants[block] for block in ("BLOCK_M", "BLOCK_N", "BLOCK") if block in constants]
    elements = (tiles[0] * tiles[-1]) / (32 * call.num_warps)
    code = _sass.read(compiled.asm["cubin"], elements) if target.backend == "cuda" else None
    return Row(
        target=name,
        kernel=variant.kernel,
        d_t=variant.d_t,
        d_s=variant.d_s,
        dtype=str(variant.dtype).removeprefix("torch."),
        bounded=variant.bounded,
        tiles="x".join(map(str, tiles)) + f" w{call.num_warps} s{call.num_stages}" + cap,
        registers=code.registers if code else None,
        spills=code.spills if code else None,
        shared_bytes=compiled.metadata.shared,
        tensor_instruction=code.tensor_instruction if code else None,
        issue=code.issue if code else None,
        exponentials=code.exponentials if code else None,
        loads=code.loads if code else None,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.target:
        for variant in variants([DTYPES[dtype] for dtype in arguments.dtype]):
            rows.append(measure(name, variant))
            print(*("-" if cell is None else cell for cell in rows[-1]), sep="  ", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "static_report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    spilled = [row for row in rows if row.spills]
    print(f"\n{len(rows)} kernels compiled, {len(spilled)} of them spill registers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
