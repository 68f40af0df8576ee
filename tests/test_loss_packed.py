"""Packed sequences, causality and prefixes: other ways to say the same sets of allowed keys."""

from itertools import pairwise

import pytest
import torch
from loss_cases import Case, Inputs, Outcome, build, evaluate
from torch import Tensor

from minilm_kernels import relation_kl
from minilm_kernels._allowed import Pattern, allowed_keys, allowed_matrix
from minilm_kernels._chunked import _blocks

pytestmark = pytest.mark.usefixtures("nan_filled")

LENGTHS = (23, 1, 0, 40, 6)
EDGES = (0, 23, 24, 24, 64, 70)
PACKED = Case(id="packed", n=75, teacher=(1, 1, 12), student=(1, 1, 6), packed=EDGES)


def padded(inputs: Inputs) -> Inputs:
    """The packed sequences as a right-padded batch."""

    def pad(x: Tensor) -> Tensor:
        rows = [x[0, :, a:b] for a, b in pairwise(EDGES)]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, 40 - row.shape[1])) for row in rows])

    teacher, student = (tuple(pad(x) for x in side) for side in inputs[:2])
    position = torch.arange(40, device=teacher[0].device)
    mask = position < torch.tensor(LENGTHS, device=position.device).unsqueeze(1)
    options = {name: value for name, value in inputs.options.items() if name != "cu_seqlens"}
    return Inputs(teacher, student, options | {"attention_mask": mask})


def as_packed(outcome: Outcome) -> Outcome:
    def pack(g: Tensor) -> Tensor:
        rows = [g[row, :, :length] for row, length in enumerate(LENGTHS)]
        return torch.nn.functional.pad(torch.cat(rows, dim=1), (0, 0, 0, 5)).unsqueeze(0)

    return Outcome(outcome.loss, tuple(pack(g) for g in outcome.gradients))


def assert_same(actual: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-7)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(g, g_expected, rtol=1e-4, atol=1e-5 * g_expected.abs().max().item())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
def test_packed_is_padded(causal: bool, reduction: str, implementation: str, device: str) -> None:
    inputs = build(PACKED, device)
    inputs.options.update(causal=causal, reduction=reduction)
    assert_same(evaluate(inputs, implementation), as_packed(evaluate(padded(inputs), implementation)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_edges_may_be_int32_or_int64(dtype: torch.dtype, implementation: str, device: str) -> None:
    inputs = build(PACKED, device)
    expected = evaluate(inputs, implementation)
    inputs.options["cu_seqlens"] = inputs.options["cu_seqlens"].to(dtype)
    assert torch.equal(evaluate(inputs, implementation).loss, expected.loss)


def test_one_packed_sequence_is_the_row(implementation: str, device: str) -> None:
    inputs = build(Case(id="one", n=40, packed=(0, 40)), device)
    packed = evaluate(inputs, implementation)
    del inputs.options["cu_seqlens"]
    assert_same(packed, evaluate(inputs, implementation))


def test_packed_row_losses_stand_where_their_tokens_stand(implementation: str, device: str) -> None:
    inputs = build(PACKED, device)
    (q_t, k_t, _), (q_s, k_s, _), options = inputs
    rows = relation_kl(
        q_t, k_t, q_s, k_s, cu_seqlens=options["cu_seqlens"], reduction="none", implementation=implementation
    )
    assert rows.shape == (1, 1, 75)
    assert rows[..., 70:].eq(0).all()
    for a, b in pairwise(EDGES):
        if a < b:
            parts = [x[:, :, a:b] for x in (q_t, k_t, q_s, k_s)]
            alone = relation_kl(*parts, reduction="none", implementation=implementation)
            torch.testing.assert_close(rows[..., a:b], alone, rtol=1e-5, atol=1e-6)


def test_causal_rows_do_not_depend_on_later_tokens(implementation: str, device: str) -> None:
    case = Case(id="causal", n=70, teacher=(1, 1, 8), student=(1, 1, 8))
    (q_t, k_t, _), (q_s, k_s, _), _ = build(case, device)
    sides = (q_t, k_t, q_s, k_s)
    rows = relation_kl(*sides, causal=True, reduction="none", implementation=implementation)
    changed = [torch.cat([x[:, :, :50], 3 - x[:, :, 50:]], dim=2) for x in sides]
    rows_changed = relation_kl(*changed, causal=True, reduction="none", implementation=implementation)
    assert torch.equal(rows[..., :50], rows_changed[..., :50])
    assert not torch.equal(rows[..., 50:], rows_changed[..., 50:])
    cut = relation_kl(*(x[:, :, :50] for x in sides), causal=True, reduction="none", implementation=implementation)
    torch.testing.assert_close(rows[..., :50], cut, rtol=1e-5, atol=1e-6)


def test_prefix_of_all_is_both_ways_and_of_none_is_causal(implementation: str, device: str) -> None:
    inputs = build(Case(id="prefix", n=37, teacher=(1, 1, 8), student=(1, 1, 8)), device)
    both_ways = evaluate(inputs, implementation)
    inputs.options.update(causal=True)
    causal = evaluate(inputs, implementation)
    for length, expected in ((37, both_ways), (0, causal), (1, causal)):
        inputs.options["prefix_lengths"] = torch.full((1,), length, device=device)
        assert_same(evaluate(inputs, implementation), expected)
    assert not torch.isclose(causal.loss, both_ways.loss, rtol=1e-2)


def test_prefix_tokens_see_each_other_and_the_rest_sees_back(implementation: str, device: str) -> None:
    """UniLM's pattern, row by row: the keys of row i are the first max(prefix, i + 1)."""
    prefix = 20
    (q_t, k_t, _), (q_s, k_s, _), _ = build(Case(id="unilm", n=37), device)
    rows = relation_kl(
        q_t, k_t, q_s, k_s, causal=True, prefix_lengths=torch.tensor([prefix], device=device), reduction="none",
        implementation=implementation,
    )  # fmt: skip
    for i in (0, prefix - 1, prefix, 36):
        keys = max(prefix, i + 1)
        log_p = torch.log_softmax(q_t[0, :, i : i + 1].double() @ k_t[0, :, :keys].double().mT / 8**0.5, -1)
        log_q = torch.log_softmax(q_s[0, :, i : i + 1].double() @ k_s[0, :, :keys].double().mT / 8**0.5, -1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).squeeze(1)
        torch.testing.assert_close(rows[0, :, i].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "batch", "length", "limit"),
    [
        (Pattern(cu_seqlens=torch.arange(0, 1001, 40)), 1, 1024, 2.0),
        (Pattern(attention_mask=torch.arange(512) < torch.tensor([[256], [128], [512], [128]])), 4, 512, 1.0),
        (Pattern(causal=True), 1, 2048, 1.3),
    ],
)
def test_the_chunked_path_computes_what_may_be_seen(pattern: Pattern, batch: int, length: int, limit: float) -> None:
    """Each allowed pair once, and few others, as a share of the allowed ones."""
    bounds = allowed_keys(pattern, "sequence", batch, length, torch.device("cpu"), torch.float32)[0]
    allowed = allowed_matrix(pattern, batch, length, torch.device("cpu"))
    computed = torch.zeros(batch, 6, length, length, dtype=torch.int8)
    for block in _blocks(bounds, torch.empty(batch, 6, length, 8, device="meta")):
        computed[block] += 1
    assert (computed.movedim(1, -1)[allowed] == 1).all()
    assert computed.sum() <= limit * 6 * allowed.sum()


SMALL_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", SMALL_INTEGERS, ids=str)
def test_small_integers_beside_a_length_that_they_cannot_hold(dtype: torch.dtype, device: str) -> None:
    inputs = build(Case(id="long", n=300, teacher=(1, 1, 4), student=(1, 1, 4)), device)
    for options in (
        {"prefix_lengths": torch.tensor([58]), "causal": True},
        {"cu_seqlens": torch.tensor([0, 50, 120])},
        {"attention_mask": (torch.arange(300) < 200)[None]},
    ):
        for implementation in ("reference", "chunked"):
            losses = []
            for integers in (torch.int64, dtype):
                moved = {k: x.to(device, integers) if isinstance(x, Tensor) else x for k, x in options.items()}
                losses.append(evaluate(Inputs(*inputs[:2], moved), implementation).loss)
            assert torch.equal(*losses)
