"""From the logits of windows to the answer to each question, and how much rather it has none.

The score of a span is the start logit of its first token plus the end logit of its last; W windows, N tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

LONGEST_ANSWER = 30  # tokens, as BERT's

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class Answers(NamedTuple):
    """Of each record.

    Attributes:
        texts: the best span of all its windows; "" for an empty context.
        no_answer_scores: the lowest score that a window gives the null token, less the score of the best span.
    """

    texts: list[str]
    no_answer_scores: list[float]


def best_answers(windows: Dataset, contexts: Sequence[str], start_logits: Floats, end_logits: Floats) -> Answers:
    """The best answer to each question.

    Args:
        windows: as `evaluation_windows` makes them of the records.
        contexts: of the records.
        start_logits, end_logits: (W, N), with anything behind a window's end.
    """
    record, null, first = (np.asarray(windows[name]) for name in ("record", "null", "first"))
    begins, ends = windows["begins"][:], windows["ends"][:]
    place = np.arange(start_logits.shape[1])
    behind = first + np.array([len(tokens) for tokens in begins])
    in_context = (first[:, None] <= place) & (place < behind[:, None])
    scores, starts, lasts = best_spans(start_logits, end_logits, in_context)
    rows = np.arange(len(windows))
    nulls = np.full(len(contexts), np.inf, dtype=np.float32)
    np.minimum.at(nulls, record, start_logits[rows, null] + end_logits[rows, null])
    best = np.full(len(contexts), -np.inf, dtype=np.float32)
    texts = [""] * len(contexts)
    for window, of in enumerate(record):
        if scores[window] > best[of]:
            best[of] = scores[window]
            start, last = starts[window] - first[window], lasts[window] - first[window]
            texts[of] = contexts[of][begins[window][start] : ends[window][last]]
    return Answers(texts, (nulls - best).tolist())


def best_spans(
    start_logits: Floats, end_logits: Floats, in_context: NDArray[np.bool_], longest: int = LONGEST_ANSWER
) -> tuple[Floats, Integers, Integers]:
    """The score, first and last token of each window's best span of at most `longest` tokens, all in the context.

    Every span is looked at, not only those between the likeliest starts and ends. The score is -inf where there is
    none.
    """
    start = np.where(in_context, start_logits, -np.inf)
    end = np.where(in_context, end_logits, -np.inf)
    tokens, rows = start.shape[1], np.arange(len(start))
    best = np.full(len(start), -np.inf, dtype=np.float32)
    starts = np.zeros(len(start), dtype=np.int64)
    lasts = starts.copy()
    for more in range(min(longest, tokens)):  # tokens behind the first
        scores = start[:, : tokens - more] + end[:, more:]
        where = scores.argmax(axis=1)
        found = scores[rows, where]
        better = found > best
        best[better], starts[better], lasts[better] = found[better], where[better], where[better] + more
    return best, starts, lasts
