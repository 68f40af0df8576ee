#!/usr/bin/env python3
"""Sentences of longer texts, a record each: what a sentence encoder is best distilled on.

    python bench/sentences.py articles.parquet sentences.parquet --count 60000

A text ends at a line's end or behind . ! ? and a space. What is shorter than 20 characters is left out, and of the rest
so many are drawn, each distinct one once.
"""

import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from _arguments import make_parser, positive

SHORTEST = 20  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    parser = make_parser(__doc__)
    parser.add_argument("texts", type=Path, help="a .parquet file with the column text")
    parser.add_argument("output", type=Path, help="the .parquet file to write")
    parser.add_argument("--count", type=positive, default=60_000, metavar="N", help="sentences (default: 60,000)")
    args = parser.parse_args(argv)
    found = list(dict.fromkeys(sentences(pd.read_parquet(args.texts, columns=["text"])["text"])))
    drawn = random.Random(0).sample(found, min(args.count, len(found)))
    pd.DataFrame({"text": drawn}).to_parquet(args.output)
    print(f"{args.output}: {len(drawn):,} of {len(found):,} sentences")
    return 0


def sentences(texts: Iterable[str]) -> Iterable[str]:
    """In their order."""
    parts = (part.strip() for text in texts for part in re.split(r"\n|(?<=[.!?]) ", text))
    return (part for part in parts if len(part) >= SHORTEST)


if __name__ == "__main__":
    sys.exit(main())
