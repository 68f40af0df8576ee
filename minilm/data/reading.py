"""The texts of one file, row by row, whatever its kind: only the wanted column is read, and each fault names its row.

A row is a line of plain text; a record of JSON (a line each, or one array, also within {"data": [...]}); a record of
CSV or TSV; or a row of an Arrow or Parquet table. Plain text, CSV and JSON may be compressed.
`minilm.data.formats` reads each kind.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from minilm.data.faults import DataError, bad_record, faults_at
from minilm.data.formats import OPENERS, READERS, NoColumnError, check_column

KINDS = {
    **dict.fromkeys((".txt", ".text", ".tokens", ".raw"), "text"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def kind_of(path: Path) -> str | None:
    """ "text", "csv", "json", "parquet" or "arrow"; None for a file that is not read."""
    plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    kind = KINDS.get(plain.suffix.lower())
    return None if plain != path and kind in ("parquet", "arrow") else kind


def read_rows(
    path: Path, column: str, start: int = 0, *, flag: str = "text_column", skip: bool = False, size: int | None = None
) -> Iterator[list[str | DataError | None]]:
    """The values of a column from row `start` (of 0, 1, ...) on, some at a time; plain text is all one column.

    Args:
        flag: that names the column, for the error.
        skip: whether a row that cannot be read is given as a `DataError` instead of a value. Otherwise it is raised.
        size: of the file when the run began.

    Raises:
        DataError: a file or row that cannot be read, no such column in the file, a value that is not text; a file whose
            size changes while it is read, or is not `size`.
    """
    row = start
    with faults_at(lambda: f"{str(path)!r} at row {row + 1}"), _of_flag(flag, path, column):
        size = path.stat().st_size if size is None else size
        _check_size(path, size)
        if not size:
            return
        for values in READERS[str(kind_of(path))](path, column, start):
            _check_size(path, size)  # before it is given out: what was cut off may end in half a text
            yield from checked(values, str(path), column, row, skip)
            row += len(values)
        _check_size(path, size)


def checked(values: list[Any], name: str, column: str, row: int, skip: bool) -> Iterator[list[str | DataError | None]]:
    """Values of a column behind `row` rows, of which an exception or what is no text is bad: see `read_rows`."""
    for place, value in enumerate(values):
        if value is None or isinstance(value, str):
            continue
        number = row + place + 1
        if not isinstance(value, Exception):
            value = DataError(f"the column {column!r} holds {value!r}, not text, in row {number} of {name!r}")
        values[place] = fault = bad_record(f"{name!r} at row {number}", value)
        if not skip:
            yield values[:place]
            raise fault
    yield values


def _check_size(path: Path, size: int) -> None:
    now = path.stat().st_size
    if now != size:
        raise DataError(f"{str(path)!r} has changed since it was first read: it had {size} bytes, and has {now} now")


def try_file(path: Path, column: str, *, skip: bool = False) -> None:
    """Reads the first rows of a file, of a table its columns. Raises `DataError` as `read_rows`."""
    if kind_of(path) != "parquet":
        for _ in itertools.islice(read_rows(path, column, skip=skip), 2):  # the second may tell what ended the first
            pass
    elif path.stat().st_size:
        with faults_at(lambda: repr(str(path))), _of_flag("text_column", path, column), pq.ParquetFile(path) as file:
            check_column(path, file.schema_arrow, column)


@contextmanager
def _of_flag(flag: str, path: Path, column: str) -> Iterator[None]:
    """A column that is not there is told with the flag that named it."""
    try:
        yield
    except NoColumnError as error:
        raise DataError(f"{str(path)!r} has no column {column!r}; choose with --{flag} from {error.columns}") from None
