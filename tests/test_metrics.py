"""Metrics of evaluations against the libraries' own formulas and worked examples."""

import math

import numpy as np
import pytest

from minilm.errors import UsageError
from minilm.evaluation.metrics import METRICS, entity_f1, scores

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
PREDICTIONS = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def test_classes_by_hand() -> None:
    found = scores(["accuracy", "f1", "matthews"], PREDICTIONS, LABELS)
    expected = {"accuracy": 70.0, "f1": 100 * 6 / 9, "matthews": 100 * (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)}
    assert found == pytest.approx(expected)


def test_f1_of_more_classes_is_the_mean() -> None:
    labels, predictions = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    assert METRICS["macro_f1"](predictions, labels) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    with pytest.raises(UsageError, match="a class 2: take macro_f1"):
        METRICS["f1"](predictions, labels)


def test_correlations_by_hand() -> None:
    labels, predictions = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    found = scores(["spearman", "pearson"], predictions, labels)
    assert found == pytest.approx({"spearman": 80.0, "pearson": 100 * 13 / math.sqrt(5 * 50)})


@pytest.mark.parametrize("metric", ["matthews", "spearman", "pearson", "f1"])
def test_constant_predictions_are_worth_nothing(metric: str) -> None:
    """Without a warning, which the tests make an error."""
    assert METRICS[metric](np.zeros(4, dtype=int), np.array([0, 1, 1, 0])) == 0.0
    assert METRICS[metric](np.array([0, 0]), np.array([0, 0])) == 0.0


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [
        (["B-NP I-NP O B-VP B-NP"], ["B-NP I-NP O B-VP O"], 2 * 2 / (3 + 2)),
        (["B-PER I-PER O"], ["B-PER O O"], 0.0),  # another end
        (["B-PER I-PER"], ["B-PER B-PER"], 0.0),  # one, where there are two
        (["I-PER I-PER O"], ["B-PER I-PER O"], 1.0),  # begun by I-
        (["B-LOC I-PER"], ["B-LOC B-PER"], 1.0),  # I- of another type begins one
        (["O", "B-PER"], ["B-PER", "O"], 0.0),  # in another text
        (["B-PER", "I-PER"], ["B-PER", "O"], 2 / 3),  # a text's end ends an entity
        (["B O I I"], ["B O B I"], 1.0),  # of one type that has no name
        (["O O"], ["O O"], 0.0),
    ],
)
def test_entities_as_conlleval_counts_them(predictions: list[str], labels: list[str], expected: float) -> None:
    split = [[text.split() for text in texts] for texts in (predictions, labels)]
    assert entity_f1(*split) == pytest.approx(expected)


def test_tags_of_another_scheme_are_refused() -> None:
    with pytest.raises(UsageError, match="O, B-TYPE and I-TYPE, got 'S-PER'"):
        entity_f1([["S-PER"]], [["B-PER"]])


def test_words_are_scored_across_texts() -> None:
    predictions, labels = [["B-X", "O"], ["O"]], [["B-X", "O"], ["B-X"]]
    assert scores(["entity_f1", "accuracy"], predictions, labels) == pytest.approx(
        {"entity_f1": 100 * 2 / 3, "accuracy": 100 * 2 / 3}
    )
