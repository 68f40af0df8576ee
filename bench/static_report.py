"""What the compiler made of every kernel, for GPUs that need not be there: registers, spills, instructions per element.

    python bench/static_report.py                                       every target, into bench/results/
    python bench/static_report.py --target sm_90 --dtype bfloat16

The kernels are compiled with their pinned tiles for sm_80, sm_89, sm_90, sm_100 and gfx942. Registers, spills and the
main loop are read from the machine code, of NVIDIA's chips only. An element is one pair of tokens of one head. Of a
kernel's main loops the one without bounds and tails is counted. static_report.csv gets the rows. None is a time.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import _sass
import torch
from _arguments import add_out, make_parser
from _cases import Triple
from _launches import KERNELS, make_launch, make_relations
from _results import old_rows, replace, write_csv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from minilm_kernels._relations import Masks
from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import HELD_DIM, resident_tokens

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DIMENSIONS = ((16, 8), (64, 32), (64, 64), (128, 128), (512, 512))  # of teacher and student
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BATCH, HEADS, LENGTH = 32, 12, 512


class Variant(NamedTuple):
    """One kernel, and the tensors that it is launched for."""

    kernel: str  # one of KERNELS
    d_t: int
    d_s: int
    dtype: torch.dtype
    bounded: bool  # with a mask that may have holes


@dataclass(kw_only=True)
class Row:
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

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.target, self.kernel, self.d_t, self.d_s, self.dtype, self.bounded)


def variants(dtypes: Sequence[torch.dtype]) -> Iterator[Variant]:
    for dtype in dtypes:
        for d_t, d_s in DIMENSIONS:
            for kernel in KERNELS:
                if (kernel == "resident" and d_t > 64) or (
                    kernel != "forward" and (kernel == "wide") != (d_t > HELD_DIM)
                ):
                    continue
                for bounded in (False, True):
                    yield Variant(kernel, d_t, d_s, dtype, bounded)


def launch(variant: Variant, architecture: int) -> Launch:
    """The launch that a call on such a GPU would make, over tensors without storage."""
    resident_length = resident_tokens(architecture, variant.dtype.itemsize)
    length = resident_length if variant.kernel == "resident" else LENGTH

    def qkv(dim: int) -> Triple:
        x = torch.empty((BATCH, length, HEADS, dim), dtype=variant.dtype, device="meta").transpose(1, 2)
        return x, x, x

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    masks: Masks = (None, None, None)
    if variant.bounded:
        bounds, holes = numbers(4, BATCH, length, dtype=torch.int32), numbers(BATCH, dtype=torch.int32)
        masks = bounds, holes, numbers(BATCH, length)
    relations = make_relations(variant.kernel, ("qk", "vv"), qkv(variant.d_t), qkv(variant.d_s), masks)
    return make_launch(variant.kernel, relations, architecture)


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
    kernel, options = call.schedule.kernel, call.schedule.options
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {name: _without_storage(value) for name, value in call.arguments.items()}
    bound, specialization, chosen = bind(**arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, chosen)
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=target, options=parsed.__dict__)


def measure(name: str, variant: Variant) -> Row:
    target = TARGETS[name]
    call = launch(variant, {90: 90, 100: 100}.get(target.arch, 80))
    compiled = compile_for(target, call)
    constants = call.arguments
    cap = f" r{call.schedule.max_registers}" if call.schedule.max_registers else ""
    tiles = [constants[block] for block in ("BLOCK_M", "BLOCK_N", "BLOCK") if block in constants]
    elements = (tiles[0] * tiles[-1]) / (32 * call.schedule.num_warps)
    parts = [(constants[f"D_{side}"], constants[f"DIM_{side}"]) for side in "TS"]
    rounds = [-(-dim // held) for dim, held in parts if dim > held]
    code = _sass.read(compiled.asm["cubin"], elements, rounds) if target.backend == "cuda" else None
    return Row(
        target=name,
        kernel=variant.kernel,
        d_t=variant.d_t,
        d_s=variant.d_s,
        dtype=str(variant.dtype).removeprefix("torch."),
        bounded=variant.bounded,
        tiles="x".join(map(str, tiles)) + f" w{call.schedule.num_warps} s{call.schedule.num_stages}" + cap,
        registers=code.registers if code else None,
        spills=code.spills if code else None,
        shared_bytes=compiled.metadata.shared,
        tensor_instruction=code.tensor_instruction if code else None,
        issue=code.issue if code else None,
        exponentials=code.exponentials if code else None,
        loads=code.loads if code else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_out(parser)
    parser.add_argument(
        "--target", choices=TARGETS, nargs="+", default=list(TARGETS), metavar="CHIP", help=", ".join(TARGETS)
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), metavar="NAME", help=", ".join(DTYPES)
    )
    arguments = parser.parse_args(argv)
    path = arguments.out / "static_report.csv"
    old = old_rows(Row, path)
    rows = []
    for name in arguments.target:
        for variant in variants([DTYPES[dtype] for dtype in arguments.dtype]):
            rows.append(measure(name, variant))
            print(*("-" if cell is None else cell for cell in astuple(rows[-1])), sep="  ", flush=True)
    write_csv(replace(old, rows), path)
    spilled = [row for row in rows if row.spills]
    print(f"\n{len(rows)} kernels compiled, {len(spilled)} of them spill registers\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
