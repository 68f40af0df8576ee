"""What runs in a process without Triton's interpreter: the library on compiled kernels, and checks of its losses."""

import atexit
import gc

import torch
from loss_cases import Case, Outcome, build, check_outcome, evaluate
from ptxrun.driver import Device
from ptxrun.machine import FIRST, OTHER

from minilm_kernels import fused_minilm_loss

DEVICES: list[Device] = []


def start(architecture: int) -> None:
    """Makes `implementation="triton"` run kernels compiled for such a GPU, on CPU tensors."""
    gc.disable()  # translated code is millions of objects, none of them in a cycle
    atexit.register(DEVICES.clear)  # else the collection at the end goes through them
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh buffers hold NaN
    DEVICES.append(Device(architecture))
    DEVICES[0].lend()


def launched(case: Case) -> set[str]:
    """Names of the kernels that loss and gradients take."""
    before = len(DEVICES[0].launched)
    evaluate(build(case, "cpu"), "triton")
    return set(DEVICES[0].launched[before:])


def check_forward(case: Case) -> None:
    """The loss without gradients."""
    inputs = build(case, "cpu")

    def loss(implementation: str, dtype: torch.dtype | None = None) -> Outcome:
        teacher, student = (tuple(x.to(dtype or x.dtype) for x in side) for side in inputs[:2])
        value = fused_minilm_loss(teacher, student, **inputs.options, implementation=implementation)
        return Outcome(value, tuple(torch.zeros((), dtype=torch.float64) for _ in student))

    check_outcome(loss("triton"), loss("reference"), loss("reference", torch.float64))


def check_repeats(case: Case) -> None:
    """The same bits in any order of programs and from any garbage in registers; inputs that stay what they are."""
    inputs = build(case, "cpu")
    tensors = *inputs.teacher, *inputs.student
    copies = [x.clone() for x in tensors]
    first = evaluate(inputs, "triton")
    DEVICES[0].schedule = OTHER
    try:
        other = evaluate(inputs, "triton")
    finally:
        DEVICES[0].schedule = FIRST
    pairs = zip((first.loss, *first.gradients), (other.loss, *other.gradients), strict=True)
    assert all([torch.equal(x, y) for x, y in pairs])
    assert all([torch.equal(x, y) for x, y in zip(tensors, copies, strict=True)])
