"""Kernels compiled for a GPU that need not be there, and executed on CPU tensors.

TRITON_INTERPRET must not be set when triton is imported.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction, create_function_from_signature

from ptxrun.machine import FIRST, Block, Schedule, execute
from ptxrun.memory import Memory
from ptxrun.program import Program, parse
from ptxrun.translate import translate


class _Ready(NamedTuple):
    ptx: str
    program: Program
    blocks: list[Block]
    shared_bytes: int


class Device:
    """Stands for a GPU of one compute capability; kernels run one after the other, on the tensors where they are."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.backend = make_backend(self.target)
        self.schedule: Schedule = FIRST
        self.launched: list[str] = []  # names of kernels
        self._ready: dict[tuple[object, ...], _Ready] = {}

    def launch(self, kernel: JITFunction[Any], programs: int, arguments: dict[str, Any], **options: Any) -> None:
        """`kernel[(programs,)](**arguments, **options)`; arguments are tensors, numbers, None, or tuples of these."""
        bound, specialization, chosen = _binder(kernel, self.backend)(**arguments, **options)
        parsed, *described = kernel._pack_args(self.backend, options, bound, specialization, chosen)
        key = kernel, *map(str, described), str(parsed)
        if key not in self._ready:
            ptx, shared_bytes = self._compile(ASTSource(kernel, *described), parsed)
            program = parse(ptx)
            self._ready[key] = _Ready(ptx, program, translate(program), shared_bytes)
        _, program, blocks, shared_bytes = self._ready[key]

        memory = Memory()
        values = list(_values(bound.items(), described[0].values(), memory))
        names = list(program.parameters)
        assert len(names) == len(values) + 2, "a kernel's own arguments, and two kinds of scratch memory"
        values += [np.uint64(0), np.uint64(0)]
        for name, value in zip(names, values, strict=True):
            assert value.itemsize == (8 if program.parameters[name].endswith("64") else 4), (name, value)
        execute(program, blocks, memory, values, programs, shared_bytes, self.schedule)
        memory.write_back()
        self.launched.append(program.name)

    def _compile(self, source: ASTSource, options: Any) -> tuple[str, int]:
        """PTX and the bytes of shared memory: `triton.compile` without ptxas, which takes a fifth of its time."""
        variables = get_cache_invalidating_env_vars()
        key = get_cache_key(source, self.backend, options, variables) + "PTX"
        cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        if found := cache.get_file("kernel.json"):
            return json.loads(Path(found).read_text())
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        generate, modules = self.backend.get_codegen_implementation(options), self.backend.get_module_map()
        module = source.make_ir(self.target, options, generate, modules, context)
        metadata = {"target": self.target, **options.__dict__, **variables}
        stages: dict[str, Any] = {}
        self.backend.add_stages(stages, options, source.language)
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            module = stages[stage](module, metadata)
        cache.put(json.dumps((module, metadata["shared"])), "kernel.json", binary=False)
        return module, metadata["shared"]

    def lend(self) -> None:
        """From now on `minilm_kernels` takes CPU tensors in Triton, with the tiles that it has for this GPU."""
        from minilm_kernels import _checks, _triton
        from minilm_kernels._triton import _launch, _plan

        def run(launch: _launch.Launch, device: torch.device) -> None:
            schedule = launch.schedule
            self.launch(schedule.kernel, schedule.programs, launch.arguments, **schedule.options)

        _launch.Launch.run = run
        _checks._triton_interprets = lambda: True
        _plan.architecture = _triton.architecture = lambda device: self.target.arch
        torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=1)


@cache
def _binder(kernel: JITFunction[Any], backend: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def _values(arguments: Any, signature: Any, memory: Memory) -> Iterator[Any]:
    """Bits of the arguments in the order of the parameters, constants left out."""
    for (name, argument), kind in zip(arguments, signature, strict=True):
        if isinstance(kind, tuple):
            yield from _values([(f"{name}[{i}]", x) for i, x in enumerate(argument)], kind, memory)
        elif kind == "constexpr":
            continue
        elif kind.startswith("*"):
            yield np.uint64(memory.add(name, argument))
        elif kind == "fp32":
            yield np.float32(argument)
        else:
            yield {"i32": np.int32, "i64": np.int64, "u64": np.uint64}[kind](argument)
