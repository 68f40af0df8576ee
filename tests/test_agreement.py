"""Agreement of a student with its teacher, against scipy's correlation and neighbours found one by one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_text import lines, tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional

from minilm.models.agreement import Agreement
from minilm.models.sentence_modules import SentenceHead

COUNT = 24
HEAD = SentenceHead(["mean"])


class Vectors(nn.Module):
    """A model whose hidden states are a table's rows, whatever stands around a token."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(60, 6, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert not self.training
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[dict[str, Any]]:
    return [tokenizer(line, return_token_type_ids=False) for line in lines(COUNT)]


def agreement_of(model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any) -> Agreement:
    return Agreement(model, rows, lambda some: tokenizer.pad(some, return_tensors="pt"), 5, HEAD)


def cosines(model: Vectors, rows: list[dict[str, Any]]) -> np.ndarray:
    unit = torch.stack([functional.normalize(model.table[row["input_ids"]].mean(0), dim=0) for row in rows])
    return (unit @ unit.mT).detach().numpy()


def test_correlation_and_neighbours_are_those_of_the_definition(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    teacher, student = Vectors(0), Vectors(1)
    student.table.data.lerp_(teacher.table.data, 0.5)
    agreement = agreement_of(teacher, rows, tokenizer)
    measured = agreement.measure(agreement.similarities(student, HEAD))

    both = [cosines(model, rows) for model in (teacher, student)]
    above = np.triu_indices(COUNT, k=1)
    assert measured["correlation"] == pytest.approx(stats.spearmanr(*(c[above] for c in both))[0], abs=1e-4)
    shared = 0
    for text in range(COUNT):
        near = [sorted(set(range(COUNT)) - {text}, key=lambda other: -c[text, other])[:10] for c in both]
        shared += len(set(near[0]) & set(near[1]))
    assert measured["neighbours"] == pytest.approx(shared / (10 * COUNT))
    assert 0.1 < measured["correlation"] < 0.95


def test_the_teacher_agrees_with_itself(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    teacher = Vectors(0).train()
    agreement = agreement_of(teacher, rows, tokenizer)
    measured = agreement.measure(agreement.similarities(teacher, HEAD))
    assert measured == pytest.approx({"correlation": 1.0, "neighbours": 1.0})
    assert teacher.training


def test_examples_are_texts_with_their_nearest(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    teacher, student = Vectors(0), Vectors(1)
    agreement = agreement_of(teacher, rows, tokenizer)
    examples = agreement.examples(agreement.similarities(student, HEAD), tokenizer)
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    assert len(examples) == len({example["text"] for example in examples}) == 5
    for example in examples:
        text = texts.index(example["text"])
        for key, model in (("teacher", teacher), ("student", student)):
            similarities = cosines(model, rows)[text]
            similarities[text] = -2
            assert example[key] == texts[similarities.argmax()]


def test_a_long_text_is_cut_to_a_line(tokenizer: Any) -> None:
    rows = [tokenizer("ab " * (60 + 10 * i), return_token_type_ids=False) for i in range(12)]
    agreement = agreement_of(Vectors(0), rows, tokenizer)
    for example in agreement.examples(agreement.similarities(Vectors(1), HEAD), tokenizer):
        assert all(len(text) == 96 and text.endswith("…") for text in example.values())


def test_of_few_texts_fewer_neighbours_are_compared(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    few = agreement_of(Vectors(0), rows[:4], tokenizer)
    assert few.neighbours == 2
    assert len(few.examples(few.similarities(Vectors(1), HEAD), tokenizer)) >= 2
    with pytest.raises(ValueError, match="agreement needs 3 texts, got 2"):
        agreement_of(Vectors(0), rows[:2], tokenizer)
