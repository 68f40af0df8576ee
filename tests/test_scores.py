"""The mean squared error of attention scores: as TinyBERT writes it, on random queries and keys with padding."""

from pathlib import Path

import pytest
import torch
from test_loss_memory import memory
from torch import Tensor

from minilm.models.observe import Observed
from minilm.objectives import scores
from minilm.objectives.scores import QK, ScoresMSE, scores_mse

LENGTHS = (9, 4, 0, 7)
MASK = (torch.arange(10) < torch.tensor(LENGTHS)[:, None]).long()


def qk(heads: int, dim: int, seed: int, *, key_heads: int | None = None, batch: int = 4, n: int = 10) -> QK:
    """(B, H, N, D) as models make them, views of (B, N, H D)."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((batch, n, count, dim) for count in (heads, key_heads or heads))
    q, k = (torch.randn(shape, generator=draw).requires_grad_().transpose(1, 2) for shape in shapes)
    return q, k


def as_written(teacher: QK, student: QK) -> Tensor:
    """(B,): sequence by sequence and head by head in float64, each with a matrix of its scores."""
    means = []
    for row, n in enumerate(LENGTHS):
        losses = []
        for head in range(teacher[0].shape[1]):
            matrices = []
            for q, k in (tuple(x.detach() for x in teacher), student):
                group = q.shape[1] // k.shape[1]
                q_head, k_head = q[row, head, :n].double(), k[row, head // group, :n].double()
                matrices.append(q_head @ k_head.T / q.shape[-1] ** 0.5)
            losses.append((matrices[0] - matrices[1]).square().mean() if n else torch.zeros((), dtype=torch.float64))
        means.append(torch.stack(losses).mean())
    return torch.stack(means)


def assert_near(actual: Tensor, expected: Tensor, rel: float = 1e-5) -> None:
    assert (actual.double() - expected.double()).norm() <= rel * expected.double().norm()


def nan_behind_the_mask(pair: QK) -> QK:
    q, k = (torch.where(MASK[:, None, :, None] != 0, x, float("nan")) for x in pair)
    return q, k


@pytest.mark.parametrize("chunk", [1, 600, 1 << 20], ids=["a head", "a row", "all"])
@pytest.mark.parametrize(("dim", "key_heads"), [(6, None), (4, 2)])
def test_loss_and_gradients_are_those_of_the_formula(
    chunk: int, dim: int, key_heads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other widths, grouped keys, and padding that holds NaN."""
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), chunk))
    teacher, student = qk(4, 6, 1), qk(4, dim, 2, key_heads=key_heads)
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5])
    expected = as_written(teacher, student)
    gradients = torch.autograd.grad(expected @ weights.double(), student)
    loss = scores_mse(nan_behind_the_mask(teacher), nan_behind_the_mask(student), MASK)
    assert loss.dtype == torch.float32
    assert_near(loss, expected)
    assert loss[2] == 0
    for actual, gradient in zip(
        torch.autograd.grad(loss @ weights, student, retain_graph=True), gradients, strict=True
    ):
        assert_near(actual, gradient)
    assert all(x is None for x in torch.autograd.grad(loss @ weights, teacher, allow_unused=True))


@pytest.mark.parametrize("difference", [1e-3, 1e-5])
def test_close_models_keep_their_digits(difference: float) -> None:
    """Where the three products of the identity agree in all digits that float32 has."""
    teacher = qk(4, 6, 1)
    q, k = (x.detach() for x in teacher)
    student = (q * (1 + difference)).requires_grad_(), k.clone().requires_grad_()
    expected = as_written(teacher, student)
    gradients = torch.autograd.grad(expected.sum(), student)
    loss = scores_mse(teacher, student, MASK)
    assert_near(loss, expected)
    for actual, gradient in zip(torch.autograd.grad(loss.sum(), student), gradients, strict=True):
        assert_near(actual, gradient)


def test_equal_models_have_no_loss_and_no_negative_one() -> None:
    teacher = qk(4, 6, 1)
    loss = scores_mse(teacher, tuple(x.detach().clone() for x in teacher), MASK)
    assert (loss >= 0).all()
    assert loss.max() < 1e-12


def test_padding_is_no_part_of_the_mean() -> None:
    """TinyBERT's own code divides by all places, padding included: a batch padded further would count less."""
    teacher, student = qk(4, 6, 1), qk(4, 6, 2)
    more = torch.nn.functional.pad(MASK, (3, 0))
    q_t, k_t, q_s, k_s = (torch.nn.functional.pad(x, (0, 0, 3, 0), value=7.0) for x in (*teacher, *student))
    assert torch.allclose(scores_mse((q_t, k_t), (q_s, k_s), more), scores_mse(teacher, student, MASK), rtol=1e-6)


def test_a_term_is_the_mean_over_sequences_that_have_tokens() -> None:
    teacher, student = ({2: (*qk(4, 6, seed), None), -1: (*qk(4, 6, seed + 1), None)} for seed in (1, 3))
    term = ScoresMSE({2: -1, -1: 2})
    loss, parts = term(Observed(teacher, {}), Observed(student, {}), {"attention_mask": MASK})
    expected = {
        f"scores_{mine}": as_written(teacher[theirs][:2], student[mine][:2]).sum() / 3
        for mine, theirs in ((2, -1), (-1, 2))
    }
    assert parts.keys() == term.parts.keys() == expected.keys()
    for name, part in parts.items():
        assert not part.requires_grad
        assert_near(part, expected[name])
    assert_near(loss, torch.stack(list(expected.values())).sum())


def test_packed_rows_are_their_sequences_one_by_one() -> None:
    teacher, student = qk(4, 6, 1), qk(4, 6, 2)
    padded = ScoresMSE({1: 1})(
        *(Observed({1: (*pair, pair[1])}, {}) for pair in (teacher, student)), {"attention_mask": MASK}
    )[0]
    index = MASK.flatten().nonzero().flatten()
    row = [
        tuple(x.transpose(1, 2).flatten(0, 1)[index].unsqueeze(0).transpose(1, 2) for x in pair)
        for pair in (teacher, student)
    ]
    batch = {
        "cu_seqlens": torch.tensor([0, 9, 13, 13, 20]),
        "token_index": torch.arange(20),
        "sequence_ids": torch.ones(1, 20),
    }
    packed = ScoresMSE({1: 1})(*(Observed({1: (*pair, pair[1])}, {}) for pair in row), batch)[0]
    assert packed.item() == pytest.approx(padded.item(), rel=1e-6)
    theirs, mine = (torch.autograd.grad(loss, student) for loss in (padded, packed))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 2e-2), (torch.float64, 1e-13)])
def test_other_dtypes(dtype: torch.dtype, rel: float) -> None:
    """Accumulated in float64 also under autocast."""
    q_t, k_t, q_s, k_s = (x.detach().to(dtype).requires_grad_() for seed in (1, 2) for x in qk(4, 6, seed))
    teacher, student = (q_t, k_t), (q_s, k_s)
    expected = as_written(teacher, student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = scores_mse(teacher, student, MASK)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(loss, expected, 1e-6 if dtype == torch.bfloat16 else rel)
    gradients = torch.autograd.grad(expected.sum(), student)
    for actual, gradient in zip(torch.autograd.grad(loss.sum(), student), gradients, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, gradient, rel)


def test_no_gradients_are_made_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: (shapes.append(size), empty(*size, **options))[1])
    with torch.no_grad():
        scores_mse(qk(4, 6, 1), qk(4, 6, 2), MASK)
    assert shapes == [((0,),), ((0,),), (4, 4)]


def test_memory_stays_under_a_tenth_of_eagers(tmp_path: Path) -> None:
    n = 4096
    pairs = [qk(1, 8, seed, batch=1, n=n) for seed in (1, 2)]

    def eager() -> None:
        s_t, s_s = (q @ k.mT / q.shape[-1] ** 0.5 for q, k in pairs)
        (s_t.detach() - s_s).square().mean().backward()

    by_matrices = memory(eager, tmp_path / "eager.json")
    linear = memory(lambda: scores_mse(*pairs).sum().backward(), tmp_path / "linear.json")
    assert by_matrices.largest >= n * n * 4  # the measure sees a float32 matrix of scores
    assert linear.peak < by_matrices.peak / 10


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"layers is \{\}"):
        ScoresMSE({})
    with pytest.raises(ValueError, match="the teacher has 4 heads and the student 2"):
        scores_mse(qk(4, 6, 1), qk(2, 6, 2))
    loss = scores_mse(qk(4, 6, 1), student := qk(4, 6, 2)).sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, student, create_graph=True)
