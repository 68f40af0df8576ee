"""What a padding mask must not let through: padding's side, content and amount, the other sequences of the batch."""

from typing import Any

import pytest
import torch
from loss_cases import Case, Inputs, Outcome, build, check_outcome, evaluate
from torch import Tensor

from minilm_kernels import _chunked, relation_kl

pytestmark = pytest.mark.usefixtures("nan_filled")

HOLED = Case(
    id="holed", n=70, batch=4, teacher=(1, 1, 12), student=(1, 1, 6), masks=("right", "left", "holes", "empty")
)


def assert_bitwise(actual: Outcome, expected: Outcome) -> None:
    assert torch.equal(actual.loss, expected.loss)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        assert (g is None) == (g_expected is None)
        assert g is None or torch.equal(g, g_expected)


def with_padding_of(inputs: Inputs, content: float) -> Inputs:
    token = inputs.options["attention_mask"][:, None, :, None]
    teacher, student = (tuple(torch.where(token, x, content) for x in side) for side in inputs[:2])
    return Inputs(teacher, student, inputs.options)


@pytest.mark.parametrize("causal", [False, True])
def test_content_of_padding_changes_no_bit(causal: bool, implementation: str, device: str) -> None:
    inputs = build(HOLED, device)
    inputs.options["causal"] = causal
    expected = evaluate(inputs, implementation)
    assert expected.loss.isfinite()
    for content in (1e30, float("nan")):
        assert_bitwise(evaluate(with_padding_of(inputs, content), implementation), expected)


def test_content_after_the_packed_sequences_changes_no_bit(implementation: str, device: str) -> None:
    case = Case(id="packed", n=70, teacher=(1, 1, 12), student=(1, 1, 6), packed=(0, 30, 30, 61))
    inputs = build(case, device)
    token = (torch.arange(70, device=device) < 61)[:, None]
    teacher, student = (tuple(torch.where(token, x, torch.nan) for x in side) for side in inputs[:2])
    expected = evaluate(inputs, implementation)
    actual = evaluate(Inputs(teacher, student, inputs.options), implementation)
    assert_bitwise(actual, expected)
    assert all(g[:, :, 61:].eq(0).all() and g[:, :, :61].ne(0).any() for g in actual.gradients)


def test_masked_tokens_get_exact_zeros(implementation: str, device: str) -> None:
    inputs = with_padding_of(build(HOLED, device), float("nan"))
    token = inputs.options["attention_mask"][:, None, :, None]
    for g in evaluate(inputs, implementation).gradients:
        assert g.masked_select(~token).eq(0).all()
        assert g.masked_select(token).ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_without_tokens(dtype: torch.dtype, implementation: str, device: str) -> None:
    """The loss is 0 and still has a graph; the gradients are zeros."""
    case = Case(id="nothing", n=19, batch=2, masks=("empty", "empty"), dtypes=(dtype, dtype))
    for reduction in ("sequence", "token", "sum"):
        inputs = with_padding_of(build(case, device), float("nan"))
        inputs.options["reduction"] = reduction
        outcome = evaluate(inputs, implementation)
        assert outcome.loss.item() == 0
        assert all(g.eq(0).all() and g.dtype == dtype for g in outcome.gradients)


def test_mask_types_mean_the_same(implementation: str, device: str) -> None:
    inputs = build(Case(id="types", n=19, batch=2, masks=("holes", "left")), device)
    expected = evaluate(inputs, implementation)
    mask = inputs.options["attention_mask"]
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
        inputs.options["attention_mask"] = mask.to(dtype)
        assert_bitwise(evaluate(inputs, implementation), expected)


def test_full_mask_is_no_mask(implementation: str, device: str) -> None:
    inputs = build(Case(id="full", n=70, batch=2, teacher=(1, 1, 8), student=(1, 1, 8)), device)
    without = evaluate(inputs, implementation)
    inputs.options["attention_mask"] = torch.ones(2, 70, device=device)
    check_as_one(evaluate(inputs, implementation), without)


def check_as_one(actual: Outcome, expected: Outcome) -> None:
    """Equal up to the rounding of another order of summation."""
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-7)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(g, g_expected, rtol=1e-4, atol=1e-5 * g_expected.abs().max().item())


def test_where_the_padding_stands_does_not_matter(implementation: str, device: str) -> None:
    """The same 23 tokens at the left, at the right, scattered, and alone."""
    alone = build(Case(id="side", n=23, teacher=(1, 1, 12), student=(1, 1, 6), relations=("qk", "vv")), device)
    expected = evaluate(alone, implementation)
    scattered = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:23].sort().values
    for places in (torch.arange(23), torch.arange(47, 70), torch.arange(30, 53), scattered):
        places = places.to(device)
        mask = torch.zeros(1, 70, dtype=torch.bool, device=device).index_fill(1, places, True)
        teacher, student = (
            tuple(x.new_full((1, 1, 70, x.shape[3]), 7.0).index_copy(2, places, x) for x in side) for side in alone[:2]
        )
        padded = evaluate(Inputs(teacher, student, alone.options | {"attention_mask": mask}), implementation)
        check_as_one(Outcome(padded.loss, tuple(g[:, :, places] for g in padded.gradients)), expected)


def rows_and_gradients(inputs: Inputs, implementation: str, order: list[int] | slice) -> tuple[Tensor, ...]:
    """Rows of the cross relation for the batch in another order, and the gradients of their sum, put back in place."""
    place = torch.arange(len(inputs.teacher[0]))[order]
    x_t, y_t = (x[place] for x in inputs.teacher[:2])
    x_s, y_s = (x[place].requires_grad_() for x in inputs.student[:2])
    options = {"attention_mask": inputs.options["attention_mask"][place], "reduction": "none"}
    rows = relation_kl(x_t, y_t, x_s, y_s, **options, implementation=implementation)
    back = place.argsort()
    return tuple(x[back] for x in (rows.detach(), *torch.autograd.grad(rows.sum(), (x_s, y_s))))


def test_batch_slot_changes_no_bit(implementation: str, device: str) -> None:
    inputs = build(HOLED, device)
    expected = rows_and_gradients(inputs, implementation, slice(None))
    for actual, straight in zip(rows_and_gradients(inputs, implementation, [2, 0, 3, 1]), expected, strict=True):
        assert torch.equal(actual, straight)


def test_sequences_do_not_meet(implementation: str, device: str) -> None:
    """The batch's rows are those of its sequences one by one, whatever the others hold."""
    inputs = build(HOLED, device)
    together = rows_and_gradients(inputs, implementation, slice(None))
    for row in range(4):
        alone = rows_and_gradients(inputs, implementation, slice(row, row + 1))
        for x, x_alone in zip(together, alone, strict=True):
            torch.testing.assert_close(x[row : row + 1], x_alone, rtol=1e-4, atol=1e-6)


def test_empty_sequences_do_not_count(implementation: str, device: str) -> None:
    inputs = build(HOLED, device)
    teacher, student = (tuple(x[:3] for x in side) for side in inputs[:2])
    without = Inputs(teacher, student, inputs.options | {"attention_mask": inputs.options["attention_mask"][:3]})
    with_it, expected = evaluate(inputs, implementation), evaluate(without, implementation)
    check_as_one(Outcome(with_it.loss, tuple(g[:3] for g in with_it.gradients)), expected)


def test_prefix_over_padding_lets_no_padding_in(fused: str, device: str) -> None:
    """A prefix ends behind the tokens: positions are positions in the tensor, and padding in it stays padding."""
    case = Case(
        id="prefix", n=70, batch=2, teacher=(1, 1, 8), student=(1, 1, 8), masks=("right", "holes"), causal=True,
        prefix=(60, 70),
    )  # fmt: skip
    inputs = with_padding_of(build(case, device), float("nan"))
    exact = evaluate(inputs, "reference", torch.float64)
    check_outcome(evaluate(inputs, fused), evaluate(inputs, "reference"), exact)
    assert exact.loss.isfinite()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "prefix_lengths": (130, 40)}], ids=str)
@pytest.mark.parametrize("reduction", ["sequence", "token", "none"])
def test_holes_wider_than_a_block(
    options: dict[str, Any], reduction: str, implementation: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the left, in the middle, at the right; a prefix that ends in a hole; NaN in them."""
    monkeypatch.setattr(_chunked, "BLOCK_ELEMENTS", 16)  # blocks of 16 rows
    inputs = build(
        Case(id="wide holes", n=140, batch=2, teacher=(1, 1, 4), student=(1, 1, 3), relations=("qk",)), device
    )
    mask = torch.zeros(2, 140, dtype=torch.bool, device=device)
    mask[0, 40:44] = mask[0, 120:] = mask[1, :3] = mask[1, 60:64] = True
    inputs = with_padding_of(Inputs(*inputs[:2], {"attention_mask": mask}), float("nan"))
    options = {k: torch.tensor(v, device=device) if k == "prefix_lengths" else v for k, v in options.items()}

    def outcome(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        x_t, y_t = (x.to(dtype) for x in inputs.teacher[:2])
        x_s, y_s = (x.detach().to(dtype).requires_grad_() for x in inputs.student[:2])
        loss = relation_kl(
            x_t, y_t, x_s, y_s, attention_mask=mask, reduction=reduction, implementation=implementation, **options
        )
        return [loss.detach(), *torch.autograd.grad(loss.sum(), (x_s, y_s))]

    exact = outcome("reference", torch.float64)
    assert exact[0].sum() > 0
    for x, x_exact in zip(outcome(implementation, torch.float32), exact, strict=True):
        torch.testing.assert_close(x, x_exact.float(), rtol=1e-4, atol=1e-6)


SMALL_INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32]


@pytest.mark.parametrize("dtype", SMALL_INTEGERS)
def test_lengths_beyond_what_the_integers_hold(dtype: torch.dtype, implementation: str, device: str) -> None:
    """N = 300 and offsets up to 120: nothing is compared in the integers' own type."""
    x, y = (torch.randn(1, 1, 300, 4, device=device, generator=torch.Generator(device).manual_seed(i)) for i in (0, 1))
    for options in ({"causal": True, "prefix_lengths": [58]}, {"cu_seqlens": [0, 50, 120]}):
        results = []
        for integers in (dtype, torch.int64):
            tensors = {
                k: torch.tensor(v, dtype=integers, device=device) if k != "causal" else v for k, v in options.items()
            }
            results.append(relation_kl(x, x, y, y, **tensors, implementation=implementation))
        assert results[0] == results[1]
