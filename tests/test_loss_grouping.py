"""The answer that calls of equal layouts and options share: no other call gets it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minilm_kernels import fused_minilm_loss, relation_kl
from minilm_kernels._grouping import known_grouping

B, H, N, D = 2, 4, 37, 6
ALL = slice(None)


def triple(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(B, H, N, D).to(dtype) for _ in range(3))
    return q, k, v


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    known_grouping.cache_clear()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"relations": ("qk",)},
    {"relations": ("vv", "qk")},
    {"relations": ("qk", "vq")},
    {"relations": {"qk": 1.0, "vv": 0.25}},
    {"relation_heads": 2},
    {"relation_heads": 8},
    {"temperature": 2.0},
    {"scale": 0.5},
    {"scale": (0.5, None)},
    {"scale": (None, 0.5)},
    {"reduction": "token"},
    {"reduction": "sum"},
    {"causal": True},
    {"attention_mask": torch.arange(11) < torch.tensor([[5], [11]])},
    {"attention_mask": torch.arange(11) < torch.tensor([[5], [11]]), "reduction": "sum"},
]


def assert_none_shares(calls: list[dict[str, Any]], part: tuple[slice, ...], implementation: str, device: str) -> None:
    """Calls with each of the options in turn, on the same part of the tensors, against each alone."""
    teacher, student = ([x[part].to(device) for x in triple(torch.float32)] for _ in range(2))
    calls = [{name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()} for options in calls]

    def outcome(options: dict[str, Any]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in student]
        loss = fused_minilm_loss(teacher, leaves, **options, implementation=implementation)
        return [loss, *torch.autograd.grad(loss, leaves, materialize_grads=True)]

    alone = []
    for options in calls:
        known_grouping.cache_clear()
        alone.append(outcome(options))
    known_grouping.cache_clear()
    for options, expected in zip([*calls, *calls], [*alone, *alone], strict=True):
        for actual, x in zip(outcome(options), expected, strict=True):
            assert torch.equal(actual, x), options


def test_calls_that_differ_in_one_option_do_not_share(device: str) -> None:
    assert_none_shares(OPTIONS, (ALL, ALL, slice(11)), "chunked", device)


def test_causal_self_relations_do_not_share_the_structure_of_others(device: str) -> None:
    """N too long for rows on chip, where the structures differ."""
    calls: list[dict[str, Any]] = [{"relations": ("vv",)}, {"relations": ("vv",), "causal": True}]
    assert_none_shares(calls, (slice(1), slice(1), ALL), "triton", device)


def test_a_self_relation_does_not_answer_for_two_tensors_of_its_layout() -> None:
    x_t, y_t, _ = triple()
    x_s, y_s, _ = triple()
    for sides in ((x_t, x_t, x_s, x_s), (x_t, y_t, x_s, y_s), (x_t, x_t, x_s, y_s), (x_t, y_t, x_s, x_s)):
        student = [x.detach().requires_grad_() for x in dict.fromkeys(sides[2:])]
        ends = student[0], student[-1]
        gradients = [
            torch.autograd.grad(relation_kl(*sides[:2], *ends, implementation=implementation), student)
            for implementation in ("chunked", "reference")
        ]
        for g, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(g, expected)


def test_layouts_and_implementations_do_not_share() -> None:
    teacher, student = triple(), triple()
    known = fused_minilm_loss(teacher, student, relation_heads=2)
    elsewhere = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in student]
    torch.testing.assert_close(fused_minilm_loss(teacher, elsewhere, relation_heads=2), known)
    assert fused_minilm_loss(triple(torch.float32), triple(torch.float32), relation_heads=2).dtype == torch.float32
    with pytest.raises(TypeError, match=r"torch\.float64.*torch\.float32"):
        fused_minilm_loss(teacher, (student[0], student[1].float(), student[2]), relation_heads=2)
    with pytest.raises(TypeError, match="triton"):
        fused_minilm_loss(teacher, student, relation_heads=2, implementation="triton")
    with pytest.raises(ValueError, match=r"37.*10"):
        fused_minilm_loss(teacher, [x[:, :, :10] for x in student], relation_heads=2)


def test_an_error_is_raised_at_every_call() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="relation_heads=5"):
            fused_minilm_loss(triple(), triple(), relation_heads=5)


def test_the_second_call_is_known() -> None:
    for count in range(3):
        fused_minilm_loss(triple(), triple())
        assert known_grouping.cache_info()[:2] == (count, 1)  # hits, misses
