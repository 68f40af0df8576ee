"""Inputs for the loss tests, what the loss makes of them, and how far from float64 that may be.

B batch, H heads, N tokens, D head dimension; q has its own head count, k and v may have fewer (grouped heads).
"""

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilm_kernels import fused_minilm_loss

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the loss; its inputs follow from it alone."""

    id: str
    n: int
    batch: int = 1
    teacher: tuple[int, int, int] = (2, 2, 8)  # heads of q, heads of k and v, head dimension
    student: tuple[int, int, int] = (2, 2, 8)
    relations: tuple[str, ...] | tuple[tuple[str, float], ...] = ("qk", "vv")
    masks: tuple[str, ...] | None = None  # one per sequence, see `mask_of`
    causal: bool = False
    prefix: tuple[int, ...] | None = None
    packed: tuple[int, ...] | None = None
    relation_heads: int | None = None
    temperature: float = 1.0
    scale: float | tuple[float | None, float | None] | None = None
    reduction: str = "sequence"
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)  # teacher, student
    size: float = 1.0  # standard deviation of every entry; scores have its square
    unit: bool = False  # every vector has length 1
    spread: float = 0.0  # tokens are scaled by exp(spread * normal), which spreads the rows' log-sum-exp
    distance: float | None = None  # student = teacher + distance * normal
    layout: str = "heads first"


class Inputs(NamedTuple):
    teacher: Triple
    student: Triple
    options: dict[str, Any]


class Outcome(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor | None, ...]  # of the student's q, k, v; None where no relation uses the tensor


def build(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def triple(heads: tuple[int, int, int], dtype: torch.dtype) -> Triple:
        q_heads, kv_heads, dim = heads
        token_size = case.size * torch.exp(case.spread * torch.randn(case.batch, 1, case.n, 1, generator=generator))
        tensors = (
            torch.randn(case.batch, h, case.n, dim, generator=generator) * token_size
            for h in (q_heads, kv_heads, kv_heads)
        )
        if case.unit:
            tensors = (torch.nn.functional.normalize(x, dim=3) for x in tensors)
        return tuple(x.to(device, dtype) for x in tensors)

    teacher = triple(case.teacher, case.dtypes[0])
    student = triple(case.student, case.dtypes[1])
    if case.distance is not None:
        student = tuple((t + case.distance * s).to(case.dtypes[1]) for t, s in zip(teacher, student, strict=True))
    options = {
        "relations": dict(case.relations) if isinstance(case.relations[0], tuple) else case.relations,
        "relation_heads": case.relation_heads,
        "causal": case.causal,
        "temperature": case.temperature,
        "scale": case.scale,
        "reduction": case.reduction,
    }
    if case.masks is not None:
        options["attention_mask"] = torch.stack([mask_of(kind, case.n, generator) for kind in case.masks]).to(device)
    if case.prefix is not None:
        options["prefix_lengths"] = torch.tensor(case.prefix, device=device)
    if case.packed is not None:
        options["cu_seqlens"] = torch.tensor(case.packed, dtype=torch.int32, device=device)
    return Inputs(lay_out(teacher, case.layout), lay_out(student, case.layout), options)


def mask_of(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """(N,) bool, true = token."""
    position = torch.arange(n)
    match kind:
        case "full":
            return position >= 0
        case "right":
            return position < (2 * n + 2) // 3
        case "left":
            return position >= n // 3
        case "one":
            return position == n // 2
        case "empty":
            return position < 0
        case "holes":
            return torch.rand(n, generator=generator) < 0.6
    raise ValueError(kind)


def lay_out(tensors: Triple, layout: str) -> Triple:
    """The same values behind other strides."""
    match layout:
        case "heads first":
            return tensors
        case "tokens first":  # views of (B, N, H·D), as a model's projections give them
            return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
        case "fused qkv":  # slices of one (B, N, 3·H·D) projection
            parts = [x.transpose(1, 2).flatten(2) for x in tensors]
            slices = torch.cat(parts, dim=2).split([part.shape[2] for part in parts], dim=2)
            return tuple(
                part.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)
                for part, x in zip(slices, tensors, strict=True)
            )
        case "dimension first":  # a last stride of N
            return tuple(x.mT.contiguous().mT for x in tensors)
        case "every other":  # a last stride of 2, NaN between
            return tuple(torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in tensors)
        case "amid NaN":  # a read past the tokens or the dimensions shows
            return tuple(
                torch.nn.functional.pad(x, (16, 16, 80, 80), value=torch.nan)[..., 80:-80, 16:-16] for x in tensors
            )
        case "expanded":  # one head for all of them, a stride of 0
            return tuple(x[:, :1].expand_as(x) for x in tensors)
        case "one token":  # for all of them
            return tuple(x[:, :, :1].expand_as(x) for x in tensors)
        case "one sequence":
            return tuple(x[:1].expand_as(x) for x in tensors)
        case "overlapping":  # token i + 1 is token i without its first number, and one more
            return tuple(x.flatten(2)[..., : x.shape[2] + x.shape[3] - 1].unfold(2, x.shape[3], 1) for x in tensors)
        case "far apart":  # a stride that needs 64 bits, of a batch of one
            return tuple(x.as_strided(x.shape, (2**33, *x.stride()[1:])) if len(x) == 1 else x for x in tensors)
        case "mixed":
            return tensors[0], *lay_out(tensors, "tokens first")[1:2], *lay_out(tensors, "every other")[2:]
    raise ValueError(layout)


def evaluate(inputs: Inputs, implementation: str, dtype: torch.dtype | None = None) -> Outcome:
    """Loss and gradients, in `dtype` if given."""
    teacher = tuple(x.to(dtype or x.dtype) for x in inputs.teacher)
    student = tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs.student)
    loss = fused_minilm_loss(teacher, student, **inputs.options, implementation=implementation)
    return Outcome(loss.detach(), torch.autograd.grad(loss, student, allow_unused=True))


@cache
def eager_and_exact(case: Case, device: str) -> tuple[Outcome, Outcome]:
    """The reference in the inputs' own types, and in float64."""
    inputs = build(case, device)
    return evaluate(inputs, "reference"), evaluate(inputs, "reference", torch.float64)


def check(case: Case, implementation: str, device: str, compiled: bool = False) -> Outcome:
    """Loss and gradients of one implementation against float64; compiled: by compiled kernels, on whatever device."""
    inputs = build(case, device)
    actual = evaluate(inputs, implementation)
    roundings = probability_roundings(case, inputs.student) if compiled or device == "cuda" else NO_ROUNDINGS
    check_outcome(actual, *eager_and_exact(case, device), roundings)
    return actual


NO_ROUNDINGS = (0.0, 0.0, 0.0)


def probability_roundings(case: Case, student: Triple) -> tuple[float, ...]:
    """What two roundings of the probabilities 1 do to the gradient of each tensor, on a GPU.

    Its exponential is an approximation, and a probability is a product with an inverse there. Where a row is one-hot
    in both models, and eager code's x / x is exactly 1, their difference keeps that.
    """
    batch, heads, length, dim = student[0].shape
    weight = 1.0 if case.reduction == "sum" else 1.0 / (batch * heads * length)
    scale = case.scale[1] if isinstance(case.scale, tuple) else case.scale
    factor = (scale or dim**-0.5) / case.temperature
    return tuple(2**-22 * weight * x.double().norm().item() * factor for x in student)


def check_outcome(actual: Outcome, eager: Outcome, exact: Outcome, roundings: tuple[float, ...] = NO_ROUNDINGS) -> None:
    assert_within_eager_error(actual.loss, eager.loss, exact.loss, floor=LOSS_FLOOR)
    largest = max(g.norm().item() for g in exact.gradients if g is not None)
    gradients = zip(actual.gradients, eager.gradients, exact.gradients, roundings, strict=True)
    for g, g_eager, g_exact, rounding in gradients:
        if g_exact is None:
            assert g is None
        else:
            assert g.dtype == g_eager.dtype
            assert_within_eager_error(g, g_eager, g_exact, floor=1e-7 * largest, rounding=rounding)


LOSS_FLOOR = 1e-7


def assert_within_eager_error(
    actual: Tensor, eager: Tensor, exact: Tensor, floor: float = 0.0, rounding: float = 0.0
) -> None:
    """An implementation may err at most twice as much, against float64, as eager code in its own dtype.

    Errors are norms. In float32 1e-5 of the exact norm is always allowed, and `floor` on top; in bfloat16 and float16
    one rounding of the output. `rounding` is allowed in all of them.
    """
    error = (actual.double() - exact).norm().item()
    eager_error = (eager.double() - exact).norm().item()
    if actual.dtype == torch.float32:
        allowed = max(1e-5 * exact.norm().item(), 2 * eager_error) + floor
    elif actual.dtype == torch.float64:
        allowed = 1e-12 * exact.norm().item() + 1e-7 * floor
    else:
        allowed = 2 * eager_error + (exact.to(actual.dtype).double() - exact).norm().item()
    allowed += rounding
    assert error <= allowed, f"error {error:.3g}, eager's {eager_error:.3g}, allowed {allowed:.3g}"
