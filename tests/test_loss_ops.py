"""The registered ops and what is built on them: opcheck, torch.compile, autocast, equal bits, CUDA graphs."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import Case, Inputs, Outcome, build, evaluate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from minilm import MiniLMLoss
from minilm_kernels import fused_minilm_loss

# dynamo instantiates the Function that it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

BF16 = torch.bfloat16
CASES = [
    Case(id="plain", n=37, batch=2, teacher=(1, 1, 8), student=(1, 1, 6)),
    Case(id="masked", n=37, batch=2, teacher=(1, 1, 8), student=(1, 1, 6), masks=("holes", "empty")),
    Case(
        id="prefix", n=37, batch=2, teacher=(1, 1, 8), student=(1, 1, 8), causal=True, prefix=(9, 30),
        masks=("left", "full"), relations=("qk", "kk"),
    ),
    Case(id="packed", n=37, teacher=(1, 1, 8), student=(1, 1, 6), packed=(0, 10, 10, 33), causal=True),
    Case(id="re-split", n=19, teacher=(4, 2, 12), student=(4, 4, 6), relation_heads=8, layout="tokens first"),
    Case(id="bf16", n=37, dtypes=(BF16, BF16), reduction="token"),
    Case(id="wide", n=19, teacher=(1, 1, 12), student=(1, 1, 130), relations=("qk", "kk"), masks=("right",)),
    Case(id="two scales", n=19, teacher=(1, 1, 8), student=(1, 1, 6), scale=(0.3, 0.9), relations=("qk", "kk")),
    Case(id="shared sides", n=19, teacher=(1, 1, 8), student=(1, 1, 6), relations=("qk", "qv", "kk", "qq")),
]  # fmt: skip
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def assert_bitwise(actual: Outcome, expected: Outcome) -> None:
    assert torch.equal(actual.loss, expected.loss)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        assert (g is None) == (g_expected is None)
        assert g is None or torch.equal(g, g_expected)


class Recorder(TorchDispatchMode):
    """The calls of our ops, as the loss makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "minilm_kernels":
            assert not kwargs
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_opcheck(case: Case, fused: str, device: str) -> None:
    with Recorder() as recorder:
        evaluate(build(case, device), fused)
    names = {op.name() for op, _ in recorder.calls}
    assert names == {f"minilm_kernels::{fused}_forward", f"minilm_kernels::{fused}_backward_"}
    functional = getattr(torch.ops.minilm_kernels, f"{fused}_backward").default
    for op, arguments in recorder.calls:
        torch.library.opcheck(op, tree_map_only(Tensor, Tensor.detach, arguments))
        if op.name().endswith("backward_"):
            torch.library.opcheck(functional, tree_map_only(Tensor, Tensor.detach, arguments))


def test_eager_code_does_not_pass_the_dispatcher(fused: str, device: str) -> None:
    with torch.profiler.profile() as profiler:
        evaluate(build(CASES[0], device), fused)
    names = [event.key for event in profiler.key_averages()]
    assert "aten::cat" in names
    assert not [name for name in names if name.startswith("minilm_kernels::")]


def test_fake_tensors_need_no_mode(fused: str, device: str) -> None:
    inputs = build(CASES[0], device)
    mode = FakeTensorMode()
    teacher, student = ([mode.from_tensor(x) for x in xs] for xs in (inputs.teacher, inputs.student))
    loss = fused_minilm_loss(teacher, [x.requires_grad_() for x in student], implementation=fused)
    gradients = torch.autograd.grad(loss, student)
    assert [type(x) for x in (loss, *gradients)] == [FakeTensor] * 4
    assert [x.shape for x in gradients] == [x.shape for x in inputs.student]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_computes_with_the_tensors_that_it_gets(fused: str, device: str) -> None:
    inputs = build(CASES[0], device)
    others = tuple(2 * x for x in inputs.student)

    def loss(*student: Tensor) -> Tensor:
        return fused_minilm_loss(inputs.teacher, student, implementation=fused)

    traced = torch.jit.trace(loss, inputs.student)
    assert torch.equal(traced(*others), loss(*others))
    assert not torch.equal(loss(*others), loss(*inputs.student))


def compiled(backend: str, **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(fused_minilm_loss, backend=backend, fullgraph=True, **options)


def evaluate_compiled(function: Callable[..., Tensor], inputs: Inputs, implementation: str) -> Outcome:
    student = tuple(x.detach().requires_grad_() for x in inputs.student)
    loss = function(inputs.teacher, student, **inputs.options, implementation=implementation)
    return Outcome(loss.detach(), torch.autograd.grad(loss, student, allow_unused=True))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, implementation) for case in CASES for implementation in ("chunked", "triton")] + [(CASES[2], "reference")],
    ids=lambda x: getattr(x, "id", x),
)
def test_compiles_without_a_graph_break(case: Case, implementation: str, device: str) -> None:
    inputs = build(case, device)
    actual = evaluate_compiled(compiled("aot_eager"), inputs, implementation)
    expected = evaluate(inputs, implementation)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=1e-7)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        assert (g is None) == (g_expected is None)
        if g is not None:
            torch.testing.assert_close(g, g_expected, rtol=1e-5, atol=1e-5 * g_expected.abs().max().item())


def test_compiles_once_for_all_lengths(fused: str, device: str) -> None:
    """Dynamic shapes: the second length runs in the first one's graph (short ones have another)."""
    function = compiled("aot_eager", dynamic=True)
    for n in (37, 45):
        heads = {"teacher": (1, 1, 8), "student": (1, 1, 6)}
        case = Case(id=f"dynamic {n}", n=n, batch=2, **heads, masks=("holes", "right"))
        actual = evaluate_compiled(function, build(case, device), fused)
        torch.testing.assert_close(actual.loss, evaluate(build(case, device), fused).loss, rtol=1e-6, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_module_compiles(fused: str, device: str) -> None:
    inputs = build(CASES[1], device)
    module = MiniLMLoss(implementation=fused)
    torch._dynamo.reset()
    arguments = inputs.teacher, tuple(x.requires_grad_() for x in inputs.student), inputs.options["attention_mask"]
    loss, parts = torch.compile(module, backend="aot_eager", fullgraph=True)(*arguments)
    expected, expected_parts = module(*arguments)
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close((loss, parts), (expected, expected_parts))


def test_compiles_without_gradients(implementation: str, device: str) -> None:
    """As an evaluation does."""
    inputs = build(CASES[1], device)
    function = compiled("aot_eager")
    with torch.no_grad():
        loss = function(*inputs[:2], **inputs.options, implementation=implementation)
    torch.testing.assert_close(loss, evaluate(inputs, implementation).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cu_seqlens", [(0, 10, 20, 99), (-5, 10, 20, 37), (20, 10, 90, 30)]),
        ("prefix_lengths", [(99,), (-9,)]),
    ],
    ids=["cu_seqlens", "prefix_lengths"],
)
def test_unchecked_values_reach_nothing_outside(
    name: str, wrong: list[tuple[int, ...]], fused: str, device: str
) -> None:
    """Compiled, or on CUDA, values are not read beforehand; outside the tensors there is NaN."""
    heads = {"teacher": (1, 1, 8), "student": (1, 1, 8)}
    inputs = build(Case(id="outside", n=37, **heads, relations=("qk", "kk"), layout="amid NaN"), device)
    inputs.options["causal"] = name == "prefix_lengths"
    function = compiled("aot_eager")
    for values in wrong:
        inputs.options[name] = torch.tensor(values, device=device)
        outcome = evaluate_compiled(function, inputs, fused)
        assert outcome.loss.isfinite(), values
        assert all(g.isfinite().all() for g in outcome.gradients if g is not None), values


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor(device: str) -> None:
    """Inside a function that does more than the loss; a second backward does not find what the first one left."""
    inputs = build(CASES[1], device)

    @torch.compile(fullgraph=True)
    def step(teacher: tuple[Tensor, ...], student: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        return 2 * fused_minilm_loss(teacher, tuple(1.5 * x for x in student), attention_mask=mask)

    torch._dynamo.reset()
    mask = inputs.options["attention_mask"]
    student = tuple(x.requires_grad_() for x in inputs.student)
    loss = step(inputs.teacher, student, mask)
    gradients = torch.autograd.grad(loss, student, retain_graph=True)
    kept = [g.clone() for g in gradients]
    assert all(torch.equal(g, again) for g, again in zip(kept, torch.autograd.grad(loss, student), strict=True))
    expected = fused_minilm_loss(inputs.teacher, tuple(1.5 * x for x in student), attention_mask=mask)
    for g, g_expected in zip(gradients, torch.autograd.grad(2 * expected, student), strict=True):
        torch.testing.assert_close(g, g_expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_autocast_and_another_run_change_no_bit(case: Case, fused: str, device: str) -> None:
    expected = evaluate(build(case, device), fused)
    with torch.autocast(device, BF16):
        assert_bitwise(evaluate(build(case, device), fused), expected)


def test_autocast_around_the_forward_changes_no_bit(implementation: str, device: str) -> None:
    """As autocast is meant to be used; above, the backward is under it too, for which autograd's own is not made."""
    inputs = build(CASES[2], device)
    student = tuple(x.requires_grad_() for x in inputs.student)
    with torch.autocast(device, BF16):
        loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=implementation)
    actual = Outcome(loss.detach(), torch.autograd.grad(loss, student, allow_unused=True))
    assert_bitwise(actual, evaluate(inputs, implementation))


def test_no_grad_gives_the_same_loss(implementation: str, device: str) -> None:
    inputs = build(CASES[1], device)
    with torch.no_grad():
        loss = fused_minilm_loss(inputs.teacher, inputs.student, **inputs.options, implementation=implementation)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, evaluate(inputs, implementation).loss, rtol=1e-6, atol=0)


def test_default_on_the_cpu_is_chunked() -> None:
    with Recorder() as recorder:
        evaluate(build(CASES[0], "cpu"), None)
    assert {op.name() for op, _ in recorder.calls} == {
        "minilm_kernels::chunked_forward",
        "minilm_kernels::chunked_backward_",
    }


@needs_cuda
@pytest.mark.parametrize(
    ("case", "chosen"),
    [
        (CASES[0], "triton"),
        (Case(id="wide", n=7, teacher=(1, 1, 257), student=(1, 1, 8)), "chunked"),
        (Case(id="double", n=7, dtypes=(torch.float64, torch.float64)), "chunked"),
    ],
)
def test_default_on_cuda(case: Case, chosen: str) -> None:
    with Recorder() as recorder:
        evaluate(build(case, "cuda"), None)
    assert {op.name().split("::")[1].split("_")[0] for op, _ in recorder.calls} == {chosen}


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cuda_graph_and_no_synchronisation(case: Case, fused: str) -> None:
    inputs = build(case, "cuda")
    student = tuple(x.requires_grad_() for x in inputs.student)

    def step() -> tuple[Tensor, ...]:
        loss = fused_minilm_loss(inputs.teacher, student, **inputs.options, implementation=fused)
        return loss, *torch.autograd.grad(loss, student, allow_unused=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for actual, x in zip(captured, expected, strict=True):
        assert (actual is None) == (x is None)
        assert x is None or torch.equal(actual, x)
