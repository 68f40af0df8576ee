"""Any call of the loss, for hypothesis: shapes, types, strides, patterns of keys, relations, heads, scales.

Structures: "chunked"; "on chip" and "sweeps" are the Triton kernels, with whole rows in registers or in tiles of 16.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import Case, Inputs, Outcome, assert_within_eager_error
from torch import Tensor

import minilm_kernels._triton as kernels
from minilm_kernels import _chunked
from minilm_kernels._triton import _plan
from minilm_kernels._triton._plan import Tiles

STRUCTURES = ("chunked", "on chip", "sweeps")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (
    "heads first", "tokens first", "fused qkv", "dimension first", "every other", "amid NaN", "expanded", "far apart",
    "one token", "one sequence", "overlapping", "mixed",
)  # fmt: skip
MASKS = ("full", "right", "left", "one", "empty", "holes")
RELATIONS = tuple(x + y for x in "qkv" for y in "qkv")
FEWER = {"chunked": 1, "on chip": 5, "sweeps": 10}  # examples, as the interpreter is slow


@contextmanager
def implementation_of(structure: str) -> Iterator[str]:
    """Its name, with blocks and tiles so small that few tokens need several."""
    _plan.known_problem.cache_clear()  # a problem remembers its structure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunked, "BLOCK_ELEMENTS", 256)
        if structure == "sweeps":
            patch.setattr(_plan, "resident_tokens", lambda architecture, element_size: 0)
            patch.setattr(kernels, "tiles", lambda kernel, problem, architecture: Tiles(16, 16, 4, 2))
        yield "chunked" if structure == "chunked" else "triton"
    _plan.known_problem.cache_clear()


def holds(structure: str, property_: Callable[..., None], **strategies: st.SearchStrategy) -> None:
    """Tries `property_(implementation, **examples)` on as many examples as the profile asks for."""
    with implementation_of(structure) as implementation:

        def one(**examples: object) -> None:
            property_(implementation, **examples)

        count = max(1, settings().max_examples // FEWER[structure])
        settings(max_examples=count)(given(**strategies)(one))()


def powers_of_ten(low: int, high: int) -> st.SearchStrategy[float]:
    """Numbers between two powers of ten, the powers themselves often."""
    whole = st.integers(low, high).map(lambda exponent: 10.0**exponent)
    return whole | st.floats(low, high).map(lambda exponent: 10.0**exponent)


@st.composite
def cases(draw: st.DrawFn, types: tuple[torch.dtype, ...] = TYPES, near: bool = False, hides: bool = False) -> Case:
    """A call that the loss takes.

    near: whether the student is the teacher, up to a small distance or none. hides: whether some tokens are padding.
    """
    n = draw(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33]) | st.integers(1, 40))
    batch = draw(st.integers(1, 2))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    dim_t, dim_s = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    teacher = kv_heads * groups, kv_heads, dim_t
    student = teacher if near else (kv_heads * groups, kv_heads, dim_s)
    relation_heads = None
    if draw(st.booleans()):
        if not near:
            student_heads = draw(st.integers(1, 2))
            student = student_heads, student_heads, dim_s
        width = math.gcd(teacher[1] * teacher[2], student[1] * student[2])
        relation_heads = draw(st.sampled_from([r for r in (1, 2, 3, 4) if width % r == 0]))
    names = draw(st.lists(st.sampled_from(RELATIONS), min_size=1, max_size=2, unique=True))
    relations = tuple(names) if draw(st.booleans()) else tuple((name, draw(st.floats(0.125, 8))) for name in names)
    pattern = draw(
        st.sampled_from(["mask", "prefix", "packed"] if hides else ["full", "mask", "causal", "prefix", "packed"])
    )
    is_causal = pattern in ("causal", "prefix") or (pattern == "packed" and draw(st.booleans()))
    masks = prefix = packed = None
    if pattern == "mask" or (is_causal and pattern != "packed" and (hides or draw(st.booleans()))):
        masks = tuple(draw(st.sampled_from(MASKS)) for _ in range(batch))
    if pattern == "prefix":
        prefix = tuple(draw(st.integers(0, n)) for _ in range(batch))
    if pattern == "packed":
        batch, packed = 1, (0, *sorted(draw(st.lists(st.integers(0, n - hides), min_size=1, max_size=4))))
    scales = st.none() | powers_of_ten(-2, 2)
    scale = draw(st.none() | scales) if near else draw(st.none() | scales | st.tuples(scales, scales))
    dtype_t, dtype_s = draw(st.sampled_from(types)), draw(st.sampled_from(types))
    dtypes = dtype_t, dtype_t if near else dtype_s
    large = 10.0 if torch.float16 in dtypes else 50.0  # eager code's products in float16 end at 65504
    return Case(
        id=f"seed {draw(st.integers(0, 999))}",
        n=n,
        batch=batch,
        teacher=teacher,
        student=student,
        relations=relations,
        masks=masks,
        causal=is_causal,
        prefix=prefix,
        packed=packed,
        relation_heads=relation_heads,
        temperature=draw(st.just(1.0) | powers_of_ten(-4, 4)),
        scale=scale,
        reduction=draw(st.sampled_from(["sequence", "token", "sum"])),
        dtypes=dtypes,
        size=draw(st.sampled_from([0.0, 1.0, large]) | powers_of_ten(-3, 0)),
        spread=draw(st.sampled_from([0.0, 0.0, 0.3])),
        distance=draw(st.just(0.0) | powers_of_ten(-6, -1)) if near else None,
        layout=draw(st.sampled_from(LAYOUTS)),
    )


def largest_score(case: Case, inputs: Inputs) -> float:
    """A bound of the scores of either model, times their factor."""
    bounds = []
    for (heads, _, dim), own, which in ((case.teacher, inputs.teacher, 0), (case.student, inputs.student, 1)):
        scale = case.scale[which] if isinstance(case.scale, tuple) else case.scale
        dim = heads * dim // (case.relation_heads or heads)
        largest = max(x.abs().max().double().item() for x in own)
        bounds.append(dim * largest**2 * (scale or dim**-0.5) / case.temperature)
    return max(bounds)


def real_tokens(case: Case, inputs: Inputs) -> Tensor:
    """(B, N) bool."""
    if case.packed is not None:
        return (torch.arange(case.n) < case.packed[-1]).unsqueeze(0)
    if case.masks is not None:
        return inputs.options["attention_mask"]
    return torch.ones(case.batch, case.n, dtype=torch.bool)


def check_rule(
    case: Case, inputs: Inputs, implementation: str, actual: Outcome, eager: Outcome, exact: Outcome
) -> None:
    """At most twice the error of eager code, and one rounding of each row's loss, probability and result.

    By luck eager code may have made none.
    """
    weights = [relation[1] if isinstance(relation, tuple) else 1.0 for relation in case.relations]
    heads, dtype = case.relation_heads or case.student[0], case.dtypes[1]
    rows = max(1, heads * int(real_tokens(case, inputs).sum()))
    row_weight = sum(weights) / (1 if case.reduction == "sum" else rows)
    scale = case.scale[1] if isinstance(case.scale, tuple) else case.scale
    factor = (scale or (case.student[0] * case.student[2] // heads) ** -0.5) / case.temperature
    assert_within_eager_error(actual.loss, eager.loss, exact.loss, floor=2**-23 * row_weight * rows)

    rounding = 2**-22 * row_weight * factor * sum(x.double().norm().item() for x in inputs.student)
    if implementation == "triton" and max(each.itemsize for each in case.dtypes) == 2:
        # the sweeps keep the logarithm of a softmax sum as one float32
        rounding *= 1 + largest_score(case, inputs)
    largest = max(g.norm().item() for g in exact.gradients if g is not None)
    for x, g, g_eager, g_exact in zip(inputs.student, actual.gradients, eager.gradients, exact.gradients, strict=True):
        assert (g is None) == (g_exact is None)
        if g is not None:
            assert g.dtype == g_eager.dtype == x.dtype
            allowed = rounding
            if dtype != torch.float32:  # of each relation, and below the normal numbers; the interpreter truncates
                eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
                allowed += len(weights) * eps * g_exact.norm().item()
                allowed += eps * smallest * g.numel() ** 0.5 * max(1.0, row_weight * max(factor, 1.0))
            assert_within_eager_error(g, g_eager, g_exact, floor=1e-7 * largest, rounding=allowed)
