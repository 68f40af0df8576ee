"""How good predictions are, from 0 (or -1, for correlations) to 1, by scikit-learn and scipy.

seqeval, the usual library for entities, is unmaintained: `entity_f1` computes what conlleval does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

from minilm.errors import UsageError

Tags = Sequence[Sequence[str]]  # of each text, of each word


def accuracy(predictions: Any, labels: Any) -> float:
    """The share of classes that are right."""
    return float(metrics.accuracy_score(labels, predictions))


def f1(predictions: Any, labels: Any) -> float:
    """Of class 1 of two classes, as GLUE has it; 0 where none is predicted and none is there.

    Raises:
        ValueError: there are more classes.
    """
    if (highest := max(np.max(predictions), np.max(labels))) > 1:
        raise UsageError(f"f1 is of the classes 0 and 1, and there is a class {highest}: take macro_f1")
    return float(metrics.f1_score(labels, predictions, zero_division=0.0))


def macro_f1(predictions: Any, labels: Any) -> float:
    """The mean of the F1 of each class that is predicted or there."""
    return float(metrics.f1_score(labels, predictions, average="macro", zero_division=0.0))


def matthews(predictions: Any, labels: Any) -> float:
    """Matthews' correlation; 0 for predictions or labels that are all the same."""
    return 0.0 if _constant(predictions, labels) else float(metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: Any, labels: Any) -> float:
    """Pearson's correlation; 0 for predictions or labels that are all the same."""
    return 0.0 if _constant(predictions, labels) else float(stats.pearsonr(predictions, labels).statistic)


def spearman(predictions: Any, labels: Any) -> float:
    """Spearman's rank correlation; 0 for predictions or labels that are all the same."""
    return 0.0 if _constant(predictions, labels) else float(stats.spearmanr(predictions, labels).statistic)


def entity_f1(predictions: Tags, labels: Tags) -> float:
    """F1 of entities, each right if its first word, its last word and its type are; 0 where there are none.

    Tags are "O", "B-TYPE" and "I-TYPE". As in conlleval an "I-" that goes on from nothing or from another type begins
    an entity.

    Raises:
        ValueError: another tag.
    """
    found, there = (set(_entities(tags)) for tags in (predictions, labels))
    return 2 * len(found & there) / (len(found) + len(there)) if found or there else 0.0


def _entities(texts: Tags) -> Iterator[tuple[int, int, int, str]]:
    """(text, first word, word after the last, type) of each."""
    for number, tags in enumerate(texts):
        begun: tuple[int, str] | None = None
        for place, tag in enumerate([*tags, "O"]):
            position, _, kind = tag.partition("-")
            if position not in ("O", "B", "I"):
                raise UsageError(f"entity_f1 takes the tags O, B-TYPE and I-TYPE, got {tag!r}")
            if begun and (position != "I" or kind != begun[1]):
                yield number, begun[0], place, begun[1]
                begun = None
            if position != "O" and not begun:
                begun = place, kind


def _constant(*values: Any) -> bool:
    return any(len(np.unique(each)) < 2 for each in values)


METRICS: Mapping[str, Callable[[Any, Any], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, macro_f1, matthews, pearson, spearman, entity_f1)
}


def scores(names: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
    """The metrics of those names, times 100.

    Args:
        predictions, labels: arrays of numbers; of words, lists of tags by text, which all metrics but `entity_f1` take
            as one list.
    """
    words = [list(chain.from_iterable(tags)) if isinstance(tags, list) else tags for tags in (predictions, labels)]
    return {name: 100 * METRICS[name](*((predictions, labels) if name == "entity_f1" else words)) for name in names}
