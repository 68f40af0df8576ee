"""NaN and infinity on any call, by hypothesis: in a real token they reach the loss, behind the mask nothing."""

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import assume
from hypothesis import strategies as st
from loss_cases import Case, Inputs, build, evaluate
from property_cases import STRUCTURES, cases, holds, real_tokens

pytestmark = [
    pytest.mark.parametrize("structure", STRUCTURES),
    pytest.mark.skipif(torch.cuda.is_available(), reason="small tiles, which are compiled for each shape there"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the interpreter
]


def check_reaches(implementation: str, case: Case, of_teacher: bool, value: float, place: int) -> None:
    inputs = build(case, "cpu")
    tokens = real_tokens(case, inputs).nonzero()
    assume(len(tokens))
    batch, token = tokens[place % len(tokens)].tolist()
    names = "".join(relation if isinstance(relation, str) else relation[0] for relation in case.relations)
    which = "qkv".index(names[place % len(names)])
    sides = [[x.clone() for x in side] for side in inputs[:2]]
    x = sides[0 if of_teacher else 1][which]
    x[batch, place % x.shape[1], token, place % x.shape[3]] = value
    assert not evaluate(Inputs(tuple(sides[0]), tuple(sides[1]), inputs.options), implementation).loss.isfinite()


def test_in_a_real_token_they_reach_the_loss(structure: str) -> None:
    values = st.sampled_from([float("nan"), float("inf"), float("-inf")])
    holds(structure, check_reaches, case=cases(), of_teacher=st.booleans(), value=values, place=st.integers(0, 999))


def check_hidden(implementation: str, case: Case, value: float) -> None:
    inputs = build(case, "cpu")
    token = real_tokens(case, inputs)[:, None, :, None]
    assume(not token.all())
    outcomes = []
    for content in (0.0, value):
        teacher, student = (tuple(torch.where(token, x, content) for x in side) for side in inputs[:2])
        outcomes.append(evaluate(Inputs(teacher, student, inputs.options), implementation))
    expected, actual = outcomes
    assert torch.equal(actual.loss, expected.loss)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        assert g is g_expected or torch.equal(g, g_expected)
        assert g is None or g.masked_select(~token).eq(0).all()


def test_behind_the_mask_they_change_no_bit(structure: str) -> None:
    values = st.sampled_from([float("nan"), float("inf"), -3e38, 1.0])
    holds(structure, check_hidden, case=cases(hides=True), value=values)
