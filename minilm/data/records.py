"""Whole records of a CSV, TSV or JSON Lines file, and the word vectors of a file as GloVe's."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.data.faults import DataError, faults_at
from minilm.data.formats import is_number, lines_of
from minilm.data.reading import kind_of
from minilm.errors import UsageError


def read_records(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of a file with all that they hold; in `columns` is text.

    Raises:
        ValueError: another kind of file; a record that cannot be read, without one of the columns or with something
            else than text there.
    """
    kind = kind_of(path)
    if kind not in ("csv", "json"):
        raise UsageError(f"{str(path)!r} is no .csv, .tsv or .jsonl file, whose records have columns")
    row = 0
    with faults_at(lambda: f"{str(path)!r} at row {row + 1}"):
        for record in _csv_records(path) if kind == "csv" else map(json.loads, filter(str.strip, lines_of(path))):
            if not isinstance(record, dict):
                raise UsageError(f"{str(record)[:40]!r} is no record with columns, as a line of .jsonl is")
            for column in columns:
                if column not in record:
                    raise UsageError(f"it has no column {column!r}; choose from {list(record)}")
                if not isinstance(record[column], str):
                    raise UsageError(f"the column {column!r} holds {record[column]!r}, not text")
            json.dumps(record, ensure_ascii=False).encode()  # JSON can spell half of a surrogate pair, which is no text
            yield record
            row += 1


def read_vectors(path: Path) -> tuple[list[str], Tensor]:
    """Words and their vectors, (words, d) float32, of lines that hold a word and d numbers each.

    Raises:
        ValueError: a line with another count of numbers than the first, or none at all; no line.

    A first line that counts words and numbers, as word2vec and fastText have it, is passed over.
    """
    words: list[str] = []
    rows: list[np.ndarray] = []
    with faults_at(lambda: f"{str(path)!r} at row {len(rows) + 1}"):
        width = 0
        for line in lines_of(path):
            fields = line.split()
            if not width and len(fields) == 2 and all(field.isdecimal() for field in fields):
                continue
            width = width or len(fields) - 1
            word, *numbers = line.rstrip().rsplit(" ", width)
            more = " " in word and is_number(word.rpartition(" ")[2])
            if len(numbers) != width or not width or more:
                raise UsageError(f"it holds {len(fields) - 1} numbers behind a word, the first row {width}")
            rows.append(np.array(numbers, dtype=np.float32))
            words.append(word)
    if not rows:
        raise DataError(f"{str(path)!r} holds no vectors")
    return words, torch.from_numpy(np.stack(rows))


def _csv_records(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 KiB
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:])
    lines = csv.reader((line + "\n" for line in lines_of(path)), delimiter="\t" if tabs else ",", strict=True)
    header = next(lines, [])
    for fields in filter(None, lines):
        if len(fields) != len(header):
            raise UsageError(f"it has {len(fields)} fields, the header {len(header)}")
        yield dict(zip(header, fields, strict=True))
