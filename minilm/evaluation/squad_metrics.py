"""Exact match and F1 of answers, and the best threshold of no answer, as SQuAD 2.0's official script defines them.

Answers are compared in lower case, without ASCII punctuation, the words a, an and the, and repeated white space; the
gold answer that fits best counts. Where a question has no answer, "" is right and anything else is wrong. (SQuAD 1.1's
script gives the same, but for gold answers of nothing else than articles and punctuation, which this one leaves out.)
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

Golds = Sequence[str]
"""The gold answers of a question; none where the question has no answer."""


def normalize(answer: str) -> str:
    """An answer as it is compared with others."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact(prediction: str, golds: Golds) -> float:
    """1 if the prediction equals one of the gold answers, else 0."""
    return float(normalize(prediction) in _comparable(golds))


def f1(prediction: str, golds: Golds) -> float:
    """The harmonic mean of precision and recall of the prediction's words, of the gold answer where it is highest."""
    words = normalize(prediction).split()
    return max(_f1_of_words(words, gold.split()) for gold in _comparable(golds))


def squad_scores(
    predictions: Sequence[str],
    golds: Sequence[Golds],
    no_answer_scores: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Means over the questions, times 100.

    Args:
        predictions: the best answer to each question; "" where there is none.
        golds: the gold answers to each question.
        no_answer_scores: how much rather than its prediction each question has no answer: a probability, or a
            difference of logits.
        threshold: a question whose no-answer score is higher counts as unanswered.

    Returns:
        "f1" and "exact". With `no_answer_scores` also "has_answer_f1", "no_answer_f1", "has_answer_exact" and
        "no_answer_exact", of the questions with and without an answer where there are any, and "best_f1",
        "best_f1_threshold", "best_exact" and "best_exact_threshold": the highest score that a threshold reaches, and
        the threshold, which is not times 100.
    """
    raw = {metric.__name__: [metric(*pair) for pair in zip(predictions, golds, strict=True)] for metric in (f1, exact)}
    if no_answer_scores is None:
        return {name: _percent(values) for name, values in raw.items()}
    has_answer = [bool(gold) for gold in golds]
    scores = {}
    for name, values in raw.items():
        kept = [
            float(not has) if score > threshold else value
            for value, has, score in zip(values, has_answer, no_answer_scores, strict=True)
        ]
        scores[name] = _percent(kept)
        for part, wanted in (("has_answer", True), ("no_answer", False)):
            if of_part := [value for value, has in zip(kept, has_answer, strict=True) if has is wanted]:
                scores[f"{part}_{name}"] = _percent(of_part)
        best = best_threshold(predictions, values, has_answer, no_answer_scores)
        scores[f"best_{name}"], scores[f"best_{name}_threshold"] = best
    return scores


def best_threshold(
    predictions: Sequence[str], values: Sequence[float], has_answer: Sequence[bool], no_answer_scores: Sequence[float]
) -> tuple[float, float]:
    """The highest mean of `values`, times 100, that a threshold of the no-answer scores reaches, and the threshold.

    If leaving all questions unanswered is best, the threshold is 0, or just below the lowest score where that is not
    above 0. Questions of equal scores are answered one by one, as the official script has it.
    """
    right = best = float(has_answer.count(False))
    threshold = min(0.0, math.nextafter(min(no_answer_scores), -math.inf))
    for i in sorted(range(len(values)), key=no_answer_scores.__getitem__):
        right += values[i] if has_answer[i] else -bool(predictions[i])
        if right > best:
            best, threshold = right, no_answer_scores[i]
    return 100 * best / len(values), threshold


def _comparable(golds: Golds) -> list[str]:
    return [gold for gold in map(normalize, golds) if gold] or [""]


def _f1_of_words(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
