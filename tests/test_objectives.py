"""Objectives by name: their relations and heads for a pair of models, and what cannot be."""

import doctest

import pytest
import torch

from minilm import objectives
from minilm.objectives import QKV, build_objective


def qkv(heads: int, dim: int, key_heads: int | None = None) -> QKV:
    def one(count: int) -> torch.Tensor:
        return torch.randn(1, count, 3, dim, generator=torch.Generator().manual_seed(0))

    return one(heads), one(key_heads or heads), one(key_heads or heads)


def test_minilm_is_qk_and_vv_with_the_models_own_heads() -> None:
    criterion = build_objective("minilm", qkv(12, 64), qkv(12, 32))
    assert (criterion.relations, criterion.relation_heads) == ({"qk": 1.0, "vv": 1.0}, None)


@pytest.mark.parametrize(
    ("teacher", "student", "heads"),
    [
        ((12, 64), (12, 32), 48),  # MiniLMv2, section 4.1: base teachers
        ((16, 64), (12, 32), 64),  # and large ones
        ((12, 64), (5, 12), 12),  # 48 does not divide 60
        ((4, 8, 1), (4, 8, 1), 4),  # 16 does not divide the 8 of keys and values
    ],
)
def test_minilm_v2_takes_four_heads_to_each_of_the_teachers(
    teacher: tuple[int, ...], student: tuple[int, ...], heads: int
) -> None:
    criterion = build_objective("minilm-v2", qkv(*teacher), qkv(*student))
    assert (list(criterion.relations), criterion.relation_heads) == (["qq", "kk", "vv"], heads)


def test_what_is_asked_for_comes_before_the_objectives_own() -> None:
    criterion = build_objective(
        "minilm-v2", qkv(4, 8), qkv(4, 8), relations={"qv": 2.0}, relation_heads=8, temperature=2.0, causal=True
    )
    assert (criterion.relations, criterion.relation_heads) == ({"qv": 2.0}, 8)
    assert (criterion.temperature, criterion.causal) == (2.0, True)


def test_what_does_not_fit_is_an_error_before_training() -> None:
    with pytest.raises(
        ValueError, match=r"neither 48 nor 12 .* the widths \[50, 768\] .* choose --relation_heads from 1, 2$"
    ):
        build_objective("minilm-v2", qkv(12, 64), qkv(5, 10))
    with pytest.raises(ValueError, match=r"12 .* 6"):
        build_objective("minilm", qkv(12, 64), qkv(6, 64))
    with pytest.raises(ValueError, match="unknown relation 'qx'"):
        build_objective("minilm", qkv(4, 8), qkv(4, 8), relations={"qx": 1.0})


def test_the_examples_of_the_documentation() -> None:
    assert doctest.testmod(objectives).attempted > 0
    assert doctest.testmod(objectives).failed == 0
