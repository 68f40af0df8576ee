"""Augmented task data (TinyBERT, algorithm 1): copies of records in which some words are replaced."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Places = Sequence[tuple[int, int, Sequence[str]]]  # of words in a text: start, end, what may stand there instead


def augmented(
    record: dict[str, Any], places: Mapping[str, Places], samples: int, probability: float, draw: random.Random
) -> Iterator[dict[str, Any]]:
    """The record, then copies of it in which each word was replaced with this probability, by one of its substitutes.

    Args:
        places: by column of text; other columns are copied. Where there are none, the record alone is given.
        samples: how many copies (the paper's N_a).
    """
    yield record
    for _ in range(samples if any(places.values()) else 0):
        texts = {column: _replaced(record[column], found, probability, draw) for column, found in places.items()}
        yield record | texts


def _replaced(text: str, places: Places, probability: float, draw: random.Random) -> str:
    parts, done = [], 0
    for start, end, words in places:
        if draw.random() < probability:
            parts += [text[done:start], draw.choice(words)]
            done = end
    return "".join([*parts, text[done:]])
