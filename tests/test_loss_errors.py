"""Every wrong use is answered by one sentence that holds both offending values, before any kernel starts."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minilm import MiniLMLoss
from minilm_kernels import fused_minilm_loss, relation_kl

B, H, N, D = 2, 4, 7, 6


class NoKernel(TorchDispatchMode):
    """Fails at the first op of the loss."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op.namespace != "minilm_kernels", f"{op} started"
        return op(*args, **(kwargs or {}))


@pytest.fixture
def no_kernel() -> Iterator[None]:
    with NoKernel():
        yield


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def x(batch: int = B, heads: int = H, n: int = N, dim: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(batch, heads, n, dim, dtype=dtype)


def triple(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x(*args, **kwargs) for _ in range(3))


def packed(**options: Any) -> dict[str, Any]:
    return {"teacher": triple(batch=1), "student": triple(batch=1), **options}


GOOD = {"teacher": triple(), "student": triple()}
integers = torch.zeros(B, H, N, D, dtype=torch.int64)

# what is wrong: (arguments, error, its two values or what it must name)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    # shapes
    "heads differ": ({"student": triple(heads=2)}, ValueError, ["4 heads", "2", "relation_heads"]),
    "relation_heads does not divide the teacher": (
        {"relation_heads": 5}, ValueError, ["relation_heads=5", "teacher", "24"],
    ),
    "relation_heads does not divide the student": (
        {"student": triple(dim=5), "relation_heads": 12}, ValueError, ["relation_heads=12", "student", "20"],
    ),
    "relation_heads does not divide a grouped tensor": (
        {"teacher": (x(), x(heads=2), x(heads=2)), "relation_heads": 8},
        ValueError, ["relation_heads=8", "teacher", "12"],
    ),
    "relation_heads of 0": ({"relation_heads": 0}, ValueError, ["relation_heads", "at least 1", "0"]),
    "relation_heads negative": ({"relation_heads": -4}, ValueError, ["relation_heads", "at least 1", "-4"]),
    "relation_heads no int": ({"relation_heads": 4.0}, TypeError, ["relation_heads", "int", "float"]),
    "batches differ": ({"student": triple(batch=3)}, ValueError, ["batch", "2", "3"]),
    "batches differ within a model": ({"teacher": (x(), x(batch=3), x())}, ValueError, ["batch", "2", "3"]),
    "lengths differ": ({"student": triple(n=9)}, ValueError, ["7", "9", "tokens"]),
    "lengths differ within a model": ({"student": (x(), x(n=9), x())}, ValueError, ["7", "9", "tokens"]),
    "no multiple of the groups": ({"teacher": (x(), x(heads=3), x())}, ValueError, ["teacher", "4", "3"]),
    "head dimensions of a pair differ": ({"student": (x(), x(dim=5), x())}, ValueError, ["student", "6", "5"]),
    "three dimensions": ({"teacher": (x()[0], x(), x())}, ValueError, ["teacher", "4", "3", "(4, 7, 6)"]),
    "no tokens": ({"teacher": triple(n=0), "student": triple(n=0)}, ValueError, ["empty", "(2, 4, 0, 6)"]),
    # types and places
    "integer tensors": ({"teacher": (integers,) * 3}, TypeError, ["teacher", "float32", "torch.int64"]),
    "complex tensors": (
        {"student": triple(dtype=torch.complex64)}, TypeError, ["student", "float32", "torch.complex64"],
    ),
    "two types in one model": (
        {"student": (x(), x(dtype=torch.bfloat16), x())}, TypeError, ["student", "torch.float32", "torch.bfloat16"],
    ),
    "no tensor": ({"teacher": (x().tolist(), x(), x())}, TypeError, ["teacher", "Tensor", "list"]),
    "two tensors": ({"teacher": (x(), x())}, TypeError, ["teacher", "three", "2"]),
    "a tensor for the three": ({"student": x()}, TypeError, ["student", "three", "Tensor"]),
    "None that a relation needs": ({"student": (x(), x(), None)}, ValueError, ["'vv'", "student", "None"]),
    "mixed devices": ({"student": tuple(t.to("meta") for t in triple())}, ValueError, ["cpu", "meta"]),
    "mixed devices in one model": ({"teacher": (x(), x().to("meta"), x())}, ValueError, ["cpu", "meta"]),
    # relations
    "unknown relation": ({"relations": ("qk", "qx")}, ValueError, ["'qx'", "q, k, v"]),
    "unknown relation in a dict": ({"relations": {"qkv": 1.0}}, ValueError, ["'qkv'", "q, k, v"]),
    "a string for the relations": ({"relations": "qk"}, TypeError, ["sequence", "'qk'"]),
    "no relation": ({"relations": ()}, ValueError, ["relations", "empty"]),
    "repeated relation": ({"relations": ("qk", "qk")}, ValueError, ["'qk'", "2 times"]),
    "negative weight": ({"relations": {"qk": 1.0, "vv": -0.5}}, ValueError, ["'vv'", "negative", "-0.5"]),
    "NaN weight": ({"relations": {"qk": float("nan")}}, ValueError, ["'qk'", "nan"]),
    "infinite weight": ({"relations": {"qk": float("inf")}}, ValueError, ["'qk'", "inf"]),
    "all weights 0": ({"relations": {"qk": 0.0}}, ValueError, ["weight 0", "qk"]),
    "a tensor for a weight": (
        {"relations": {"qk": torch.nn.Parameter(torch.tensor(1.5))}}, TypeError, ["'qk'", "number", "Parameter"],
    ),
    "a string for a weight": ({"relations": {"qk": "1.5"}}, TypeError, ["'qk'", "number", "'1.5'"]),
    "complex weight": ({"relations": {"qk": 1j}}, TypeError, ["'qk'", "number", "complex"]),
    "weight beyond every float": ({"relations": {"qk": 10**400}}, ValueError, ["'qk'", "3.4e+38"]),
    "weight beyond float32": ({"relations": {"qk": 1e300}}, ValueError, ["'qk'", "finite", "1e+300"]),
    "None for the relations": ({"relations": None}, TypeError, ["sequence", "None"]),
    "a tensor for the relations": ({"relations": torch.ones(2)}, TypeError, ["sequence", "Tensor"]),
    "lists for relations": ({"relations": [["qk"], ["vv"]]}, ValueError, ["['qk']", "q, k, v"]),
    # allowed keys
    "sparse tensor": ({"teacher": (x().to_sparse(), x(), x())}, TypeError, ["teacher", "dense", "torch.sparse_coo"]),
    "mkldnn tensor": ({"student": (x().to_mkldnn(), x(), x())}, TypeError, ["student", "dense", "torch._mkldnn"]),
    "nested tensor": (
        {"teacher": (torch.nested.nested_tensor([x()[0], x()[1]], layout=torch.jagged), x(), x())},
        TypeError, ["teacher", "dense", "nested"],
    ),
    "causal a string": ({"causal": "no"}, TypeError, ["causal", "True or False", "'no'"]),
    "causal a list": ({"causal": []}, TypeError, ["causal", "True or False", "[]"]),
    "causal a tensor": ({"causal": torch.tensor([True, False])}, TypeError, ["causal", "True or False", "Tensor"]),
    "causal a number": ({"causal": 2}, TypeError, ["causal", "True or False", "2"]),
    "additive mask": (
        {"attention_mask": torch.tensor([[0.0] * 5 + [-1e9] * 2] * B)}, ValueError,
        ["attention_mask", "0 and 1", "-1000000000.0"],
    ),
    "additive mask of integers": (
        {"attention_mask": torch.tensor([[0] * 5 + [-10000] * 2] * B)}, ValueError,
        ["attention_mask", "positive", "-10000"],
    ),
    "NaN mask": ({"attention_mask": torch.full((B, N), torch.nan)}, ValueError, ["attention_mask", "0 and 1", "nan"]),
    "sparse mask": (
        {"attention_mask": torch.ones(B, N).to_sparse()}, TypeError, ["attention_mask", "dense", "torch.sparse_coo"],
    ),
    "complex mask": (
        {"attention_mask": torch.ones(B, N, dtype=torch.complex64)}, TypeError,
        ["attention_mask", "integer", "torch.complex64"],
    ),
    "complex prefix": (
        {"prefix_lengths": torch.ones(B, dtype=torch.complex64), "causal": True}, TypeError,
        ["prefix_lengths", "integer", "torch.complex64"],
    ),
    "complex packing": (
        packed(cu_seqlens=torch.tensor([0j, 7])), TypeError, ["cu_seqlens", "integer", "torch.complex64"],
    ),
    "mask of another shape": (
        {"attention_mask": torch.ones(B, N + 1)}, ValueError, ["attention_mask", "(2, 7)", "(2, 8)"],
    ),
    "4-D mask": ({"attention_mask": torch.ones(B, 1, N, N)}, ValueError, ["attention_mask", "(2, 7)", "(2, 1, 7, 7)"]),
    "mask elsewhere": (
        {"attention_mask": torch.ones(B, N, device="meta")}, ValueError, ["attention_mask", "meta", "cpu"],
    ),
    "mask no tensor": ({"attention_mask": [[1] * N] * B}, TypeError, ["attention_mask", "Tensor", "list"]),
    "prefix without causal": (
        {"prefix_lengths": ints(1, 2)}, ValueError, ["prefix_lengths", "causal=True", "causal=False"],
    ),
    "prefix of another shape": (
        {"prefix_lengths": ints(1, 2, 3), "causal": True}, ValueError, ["prefix_lengths", "(2,)", "(3,)"],
    ),
    "prefix too long": ({"prefix_lengths": ints(1, 8), "causal": True}, ValueError, ["prefix_lengths", "7", "[1, 8]"]),
    "prefix negative": (
        {"prefix_lengths": ints(-1, 2), "causal": True}, ValueError, ["prefix_lengths", "0", "[-1, 2]"],
    ),
    "prefix of floats": (
        {"prefix_lengths": torch.ones(B), "causal": True}, TypeError, ["prefix_lengths", "integer", "torch.float32"],
    ),
    "prefix elsewhere": (
        {"prefix_lengths": ints(1, 2).to("meta"), "causal": True}, ValueError, ["prefix_lengths", "meta", "cpu"],
    ),
    "packed and masked": (
        packed(cu_seqlens=ints(0, 7), attention_mask=torch.ones(1, N)), ValueError, ["cu_seqlens", "attention_mask"],
    ),
    "packed with prefix": (
        packed(cu_seqlens=ints(0, 7), prefix_lengths=ints(1), causal=True),
        ValueError, ["cu_seqlens", "prefix_lengths"],
    ),
    "packed batch": ({"cu_seqlens": ints(0, 7)}, ValueError, ["cu_seqlens", "B = 1", "B = 2"]),
    "packed past the end": (packed(cu_seqlens=ints(0, 3, 8)), ValueError, ["cu_seqlens", "7", "[0, 3, 8]"]),
    "packed not from 0": (packed(cu_seqlens=ints(1, 3, 7)), ValueError, ["cu_seqlens", "0", "[1, 3, 7]"]),
    "packed falling": (packed(cu_seqlens=ints(0, 5, 3)), ValueError, ["cu_seqlens", "rise", "[0, 5, 3]"]),
    "packed without an end": (packed(cu_seqlens=ints(0)), ValueError, ["cu_seqlens", "(S + 1,)", "(1,)"]),
    "packed 2-D": (packed(cu_seqlens=ints(0, 7)[None]), ValueError, ["cu_seqlens", "(S + 1,)", "(1, 2)"]),
    "packed by floats": (
        packed(cu_seqlens=torch.tensor([0.0, 7.0])), TypeError, ["cu_seqlens", "integer", "torch.float32"],
    ),
    "packed by a list": (packed(cu_seqlens=[0, 7]), TypeError, ["cu_seqlens", "Tensor", "list"]),
    "packed elsewhere": (packed(cu_seqlens=ints(0, 7).to("meta")), ValueError, ["cu_seqlens", "meta", "cpu"]),
    # numbers and names
    "temperature 0": ({"temperature": 0.0}, ValueError, ["temperature", "positive", "0.0"]),
    "temperature negative": ({"temperature": -1.5}, ValueError, ["temperature", "positive", "-1.5"]),
    "temperature NaN": ({"temperature": float("nan")}, ValueError, ["temperature", "positive", "nan"]),
    "temperature a tensor": ({"temperature": torch.tensor(2.0)}, TypeError, ["temperature", "number", "Tensor"]),
    "temperature infinite": ({"temperature": float("inf")}, ValueError, ["temperature", "3.4e+38", "inf"]),
    "temperature below float32": ({"temperature": 1e-46}, ValueError, ["temperature", "1.18e-38", "1e-46"]),
    "temperature below every normal float": (
        {"temperature": 1e-320}, ValueError, ["temperature", "1.18e-38", "1e-320"],
    ),
    "temperature beyond every float": ({"temperature": 10**400}, ValueError, ["temperature", "3.4e+38"]),
    "temperature a string": ({"temperature": "2"}, TypeError, ["temperature", "number", "'2'"]),
    "scale 0": ({"scale": 0.0}, ValueError, ["teacher's scale", "positive", "0.0"]),
    "scale negative": ({"scale": (None, -0.5)}, ValueError, ["student's scale", "positive", "-0.5"]),
    "scale NaN": ({"scale": (1.0, float("nan"))}, ValueError, ["student's scale", "positive", "nan"]),
    "scale infinite": ({"scale": float("inf")}, ValueError, ["teacher's scale", "1e+08", "inf / 1"]),
    "scale beyond what kernels hold": (
        {"scale": (1.0, 4e-5), "temperature": 5e3}, ValueError, ["student's scale", "1e-08", "4e-05 / 5e+03"],
    ),
    "temperature that no scale outweighs": ({"temperature": 1e20}, ValueError, ["teacher's scale", "0.408 / 1e+20"]),
    "scale a tensor": ({"scale": torch.tensor(2.0)}, TypeError, ["teacher's scale", "number", "Tensor", ".item()"]),
    "scale a string": ({"scale": "2"}, TypeError, ["teacher's scale", "number", "'2'"]),
    "three scales": ({"scale": (1.0, 2.0, 3.0)}, ValueError, ["scale", "two", "3 of them"]),
    "no reduction": ({"reduction": None}, ValueError, ["reduction", "sequence, token, sum", "None"]),
    "a tensor for the reduction": ({"reduction": torch.ones(9, 9)}, ValueError, ["reduction", "Tensor"]),
    "a list for the implementation": ({"implementation": ["triton"]}, ValueError, ["implementation", "['triton']"]),
    "unknown reduction": ({"reduction": "mean"}, ValueError, ["reduction", "sequence, token, sum", "'mean'"]),
    "rows of a sum of relations": ({"reduction": "none"}, ValueError, ["reduction", "sequence, token, sum", "'none'"]),
    "unknown implementation": (
        {"implementation": "cuda"}, ValueError, ["implementation", "triton, chunked, reference", "'cuda'"],
    ),
    "triton in float64": (
        {"teacher": triple(dtype=torch.float64), "student": triple(dtype=torch.float64), "implementation": "triton"},
        TypeError, ["triton", "float32", "float64"],
    ),
    "triton over 1024 dimensions": (
        {"teacher": triple(dim=1025), "student": triple(dim=8), "implementation": "triton"},
        ValueError, ["triton", "1024", "1025"],
    ),
}  # fmt: skip


def assert_one_sentence(message: str, parts: list[str]) -> None:
    assert "\n" not in message
    for part in parts:
        assert re.search(rf"(?<!\w){re.escape(part)}(?!\w)", message), f"{part!r} is not in {message!r}"


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_of_the_loss(wrong: str) -> None:
    arguments, error, parts = WRONG[wrong]
    with pytest.raises(error) as raised:
        fused_minilm_loss(**GOOD | arguments)
    assert_one_sentence(str(raised.value), parts)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_of_the_module(wrong: str) -> None:
    arguments, error, parts = WRONG[wrong]
    arguments = GOOD | arguments
    where = {
        name: arguments.pop(name) for name in ("attention_mask", "prefix_lengths", "cu_seqlens") if name in arguments
    }
    teacher, student = arguments.pop("teacher"), arguments.pop("student")
    with pytest.raises(error) as raised:
        MiniLMLoss(**arguments)(teacher, student, **where)
    assert_one_sentence(str(raised.value), parts)


def test_module_refuses_relations_at_once() -> None:
    with pytest.raises(ValueError, match="'qx'"):
        MiniLMLoss(("qx",))


ONE_RELATION: dict[str, tuple[Callable[[], Tensor], type[Exception], list[str]]] = {
    "batches": (lambda: relation_kl(x(), x(), x(batch=3), x(batch=3)), ValueError, ["batch", "2", "3"]),
    "lengths": (lambda: relation_kl(x(), x(), x(), x(n=9)), ValueError, ["7", "9", "y_s"]),
    "heads": (lambda: relation_kl(x(), x(), x(heads=2), x(heads=2)), ValueError, ["4 heads", "2", "relation_heads"]),
    "integers": (lambda: relation_kl(x(), integers, x(), x()), TypeError, ["y_t", "float32", "torch.int64"]),
    "None": (lambda: relation_kl(x(), x(), x(), None), TypeError, ["y_s", "Tensor", "NoneType"]),
    "reduction": (lambda: relation_kl(x(), x(), x(), x(), reduction="rows"), ValueError, ["none", "'rows'"]),
    "devices": (lambda: relation_kl(x(), x(), x(), x().to("meta")), ValueError, ["cpu", "meta"]),
}


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("wrong", ONE_RELATION)
def test_wrong_use_of_one_relation(wrong: str) -> None:
    call, error, parts = ONE_RELATION[wrong]
    with pytest.raises(error) as raised:
        call()
    assert_one_sentence(str(raised.value), parts)


def test_triton_by_name_does_not_fall_back_without_a_gpu() -> None:
    """Where triton does not interpret, hence in a fresh process."""
    program = (
        "import torch; from minilm_kernels import fused_minilm_loss; x = torch.zeros(1, 1, 2, 2); "
        "fused_minilm_loss((x, x, x), (x, x, x), implementation='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(r"ValueError: implementation='triton' .*cuda.*cpu", run.stderr)


def test_numbers_of_numpy_are_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 4, 7, 6, generator=generator) for _ in range(2))
    sides = (teacher,) * 3, (student,) * 3
    numbers = {"relation_heads": np.int64(2), "temperature": np.float64(0.5), "scale": np.float32(0.75)}
    options = {"relations": {"qk": np.float32(1.5)}, "causal": np.True_, **numbers}
    plain = {"relations": {"qk": 1.5}, "relation_heads": 2, "temperature": 0.5, "scale": 0.75, "causal": True}
    for implementation in ("reference", "chunked"):
        loss = fused_minilm_loss(*sides, **options, implementation=implementation)
        assert torch.equal(loss, fused_minilm_loss(*sides, **plain, implementation=implementation))
