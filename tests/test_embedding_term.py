"""The sentence embedding as a term: against the formula in float64, on padded and packed batches, and on ranks."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from embedding_step import objective, one_step
from one_step import trainer
from safetensors.torch import load_file
from test_trainer import assert_close
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel
from two_ranks import whole_halves_and_ranks

from minilm.models.batches import as_packed
from minilm.models.observe import Observed
from minilm.models.sentence_modules import Dense, Normalize, SentenceHead
from minilm.objectives.embedding import SentenceEmbedding, sentence_embedding
from minilm.training.saving import OBJECTIVE

B, N, D_T, D_S, E = 4, 11, 12, 8, 6
LENGTHS = (11, 4, 0, 1)
MASK = (torch.arange(N) < torch.tensor(LENGTHS)[:, None]).long()


def hidden(width: int, seed: int) -> Tensor:
    """(B, N, width), NaN behind the mask."""
    states = torch.randn(B, N, width, generator=torch.Generator().manual_seed(seed))
    return states.masked_fill(MASK.unsqueeze(2) == 0, torch.nan)


def term(loss: str, seed: int = 0) -> SentenceEmbedding:
    """A teacher with a dense layer and a normalisation; a student with a dense layer, and a projection."""
    torch.manual_seed(seed)
    teacher = SentenceHead(["mean"], [Dense(D_T, 10, activation=torch.nn.Tanh()), Normalize()])
    student = SentenceHead(["mean"], [Dense(D_S, E), Normalize()])
    projection = torch.nn.Sequential(Dense(E, 10, bias=False), Normalize())
    return SentenceEmbedding(teacher, student, projection, loss=loss, weight=0.5, width=D_S)


def run(term: SentenceEmbedding, teacher: Tensor, student: Tensor, **batch: Tensor) -> Tensor:
    loss, parts = term(Observed({}, {}, teacher), Observed({}, {}, student), batch)
    torch.testing.assert_close(loss.detach(), term.parts["embedding"] * parts["embedding"])
    return loss


def by_the_formula(term: SentenceEmbedding, teacher: Tensor, student: Tensor) -> Tensor:
    """In float64, sentence by sentence; those without a token are none."""
    dense_t, dense_s, projection = term.teacher_head.further[0], term.student_head.further[0], term.projection[0]
    losses = []
    for index, length in enumerate(LENGTHS):
        if not length:
            continue
        t = torch.tanh(dense_t.weight @ teacher[index, :length].mean(0) + dense_t.bias)
        s = projection.weight @ (dense_s.weight @ student[index, :length].mean(0) + dense_s.bias)
        t, s = t / t.norm(), s / s.norm()
        losses.append(1 - s @ t if term.loss == "cosine" else ((s - t) ** 2).sum() / len(t))
    return 0.5 * sum(losses) / len(losses)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_loss_and_gradients_are_those_of_the_formula(loss: str) -> None:
    mine, exact = term(loss), term(loss).double()
    exact.teacher_head.double()
    teacher, student = hidden(D_T, 1), hidden(D_S, 2).requires_grad_()
    wide = student.detach().double().requires_grad_()
    value, expected = run(mine, teacher, student, attention_mask=MASK), by_the_formula(exact, teacher.double(), wide)
    assert value.dtype == torch.float32
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert wide.grad is not None
    torch.testing.assert_close(student.grad, wide.grad.float(), rtol=1e-5, atol=1e-7)
    own, theirs = dict(mine.named_parameters()), dict(exact.named_parameters())
    assert own.keys() == {"own_head.further.0.weight", "own_head.further.0.bias", "projection.0.weight"}
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad.float(), rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in mine.teacher_head.parameters())


def test_float64_stays_float64_and_close_vectors_lose_no_digits() -> None:
    head = SentenceHead(["mean"])
    teacher = torch.randn(1, 3, 5, dtype=torch.float64)
    student = teacher + 1e-5 * torch.randn_like(teacher)
    exact = 1 - functional.cosine_similarity(teacher.mean(1), student.mean(1))
    alone = SentenceEmbedding(head, width=5)
    assert run(alone, teacher, student).dtype == torch.float64
    assert run(alone, teacher, student).item() == pytest.approx(exact.item(), rel=1e-3)
    # 1 - cosine itself gives 0 or 6e-8 in float32.
    assert run(alone, teacher.float(), student.float()).item() == pytest.approx(exact.item(), rel=0.1)


def test_under_autocast_it_is_computed_in_float32() -> None:
    both = term("cosine"), hidden(D_T, 1), hidden(D_S, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = run(*both, attention_mask=MASK)
    assert torch.equal(value, run(*both, attention_mask=MASK))
    halves = run(both[0], both[1].bfloat16(), both[2].bfloat16(), attention_mask=MASK)
    assert halves.dtype == torch.float32
    assert halves.item() == pytest.approx(value.item(), rel=1e-2)


@pytest.mark.parametrize("pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_packed_sentences_are_as_those_alone(pooling: str) -> None:
    lengths = torch.tensor([0, 3, 5, 1, 0])
    alone = SentenceEmbedding(SentenceHead([pooling]), width=D_S)
    teacher, student = (
        torch.randn(1, 9, D_S, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    student.requires_grad_()
    ends = functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = {"cu_seqlens": ends, "token_index": torch.arange(9), "sequence_ids": torch.ones(1, 9)}
    value = run(alone, teacher, student, **packed)
    (gradient,) = torch.autograd.grad(value, student)
    apart = [
        run(alone, teacher[:, start:end], student[:, start:end])
        for start, end in pairwise(ends.tolist())
        if start < end
    ]
    expected = torch.stack(apart).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_rows_of_several_sentences_are_taken_apart() -> None:
    """Padding between them is no token."""
    batch = as_packed(
        {
            "input_ids": torch.full((2, 4), 7),
            "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
            "position_ids": torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]]),
        }
    )
    states = torch.randn(2, 4, D_S)
    states[0, 3] = torch.nan
    vectors = SentenceHead(["mean"])(states, batch)
    torch.testing.assert_close(vectors, torch.stack([states[0, :2].mean(0), states[0, 2], states[1].mean(0)]))


@pytest.mark.parametrize(
    ("width", "dim", "dense", "projection"),
    [
        (32, None, None, None),  # the student keeps what the teacher has
        (16, None, (16, 32), None),
        (16, 16, None, (16, 32)),
        (16, 8, (16, 8), (8, 32)),
        (16, 32, (16, 32), None),
        (32, 32, None, None),
        (32, 16, (32, 16), (16, 32)),
    ],
)
def test_what_is_learnt_beside_the_student(
    width: int, dim: int | None, dense: tuple[int, int] | None, projection: tuple[int, int] | None
) -> None:
    teacher, student = tiny_model("bert"), tiny_model("bert", hidden_size=width)
    made = sentence_embedding(teacher, student, student_embedding_dim=dim)
    own = [(layer.in_features, layer.out_features) for layer in made.student_head.further]
    assert own == ([dense] if dense else [])
    assert (made.projection is None) == (projection is None)
    if made.projection is not None:
        assert made.projection[0].weight.shape == projection[::-1]
        assert made.projection[0].bias is None
    if dense == (16, 32):  # it keeps the cosines that it starts with
        vectors = torch.randn(5, 16)
        wider = made.student_head.further(vectors)
        torch.testing.assert_close(wider @ wider.mT, vectors @ vectors.mT, rtol=1e-4, atol=1e-4)


def test_of_a_student_in_shards_the_gathered_weights_are_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, criterion=objective())
    gathered = {name: tensor + 1 for name, tensor in run.model.state_dict().items()}
    run._save(str(tmp_path / "out"), state_dict=gathered)
    saved = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert torch.equal(saved["linear.weight"], run.terms[0].student_head.further[0].weight + 1)


def test_of_images_there_are_no_sentences() -> None:
    vision = tiny_model("vit")
    with pytest.raises(ValueError, match="the embedding is of sentences, and ViTModel takes pixel_values"):
        sentence_embedding(vision, vision)


def test_one_micro_batch_several_and_two_ranks_take_the_same_step(tmp_path: Path) -> None:
    folders = whole_halves_and_ranks(one_step, tmp_path)
    states = []
    for folder in folders:
        term = torch.load(folder / "checkpoint-1" / OBJECTIVE)
        assert torch.equal(
            load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"], term["0.own_head.further.0.weight"]
        )
        states.append(AutoModel.from_pretrained(folder).state_dict() | term)
    logged = [json.loads((folder / "log.json").read_text()) for folder in folders]
    for other, log in zip(states[1:], logged[1:], strict=True):
        assert_close(other, states[0], rtol=1e-5, atol=1e-6)
        assert log == pytest.approx(logged[0], rel=1e-5)
