"""The texts of one file, row by row, whatever its kind: only the wanted column is read, and each fault names its row.

A row is a line of plain text; a record of JSON (a line each, or one array, also within {"data": [...]}); a record of
CSV or TSV; or a row of an Arrow or Parquet table. Plain text, CSV and JSON may be compressed.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minilm.errors import UsageError

ROWS_AT_ONCE = 256  # many enough to be fast, few enough to hold
KINDS = {
    **dict.fromkeys((".txt", ".text", ".tokens", ".raw"), "text"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}
_FAULTS = (OSError, EOFError, ValueError, csv.Error, zlib.error, lzma.LZMAError, pa.ArrowException)

Rows = Iterator[list[Any]]


class DataError(UsageError):
    """What stands in the data cannot be read: one sentence with the file and the row."""

    def __init__(self, sentence: str) -> None:
        # A loader's worker hands on its whole traceback, which ends with the sentence.
        super().__init__(sentence.rpartition(f"{type(self).__name__}: ")[2].strip())


def kind_of(path: Path) -> str | None:
    """ "text", "csv", "json", "parquet" or "arrow"; None for a file that is not read."""
    plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    kind = KINDS.get(plain.suffix.lower())
    return None if plain != path and kind in ("parquet", "arrow") else kind


class _NoColumnError(ValueError):
    """A file has other columns, `columns`."""

    def __init__(self, columns: list[str]) -> None:
        super().__init__(columns)
        self.columns = columns


def read_rows(path: Path, column: str, start: int = 0, flag: str = "text_column") -> Iterator[list[str | None]]:
    """The values of a column from row `start` (of 0, 1, ...) on, some at a time; plain text is all one column.

    Args:
        flag: that names the column, for the error.

    Raises:
        DataError: a file or row that cannot be read, no such column in the file, a value that is not text.
    """
    row = start
    with faults_at(lambda: f"{str(path)!r} at row {row + 1}"), _of_flag(flag, path, column):
        if not path.stat().st_size:
            return
        for values in _READERS[str(kind_of(path))](path, column, start):
            for number, value in enumerate(values, row + 1):
                if value is not None and not isinstance(value, str):
                    raise DataError(
                        f"the column {column!r} holds {value!r}, not text, in row {number} of {str(path)!r}"
                    )
            yield values
            row += len(values)


def try_file(path: Path, column: str) -> None:
    """Reads the first rows of a file, of a table its columns. Raises `DataError` as `read_rows`."""
    if kind_of(path) != "parquet":
        next(read_rows(path, column), None)
    elif path.stat().st_size:
        with faults_at(lambda: repr(str(path))), _of_flag("text_column", path, column), pq.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)


@contextmanager
def _of_flag(flag: str, path: Path, column: str) -> Iterator[None]:
    """A column that is not there is told with the flag that named it."""
    try:
        yield
    except _NoColumnError as error:
        raise DataError(f"{str(path)!r} has no column {column!r}; choose with --{flag} from {error.columns}") from None


@contextmanager
def faults_at(place: Callable[[], str]) -> Iterator[None]:
    """What goes wrong in reading as a `DataError` at `place()`."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read {place()}: the byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, for "
            f"example by iconv -f {_encoding(error.object)} -t utf-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"cannot read {place()}: no JSON ({error.msg} at character {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"cannot read {place()}: its JSON is nested too deeply") from error
    except _FAULTS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot read {place()}: {' '.join(reason.split()) or type(error).__name__}") from error


def _encoding(line: bytes) -> str:
    """What a line that is not UTF-8 may be in: a file's first one tells it by its byte-order mark."""
    marks = {
        codecs.BOM_UTF32_LE: "utf-32",  # before the UTF-16 mark that it begins with
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    return next((encoding for mark, encoding in marks.items() if line.startswith(mark)), "latin1")


def lines_of(path: Path) -> Iterator[str]:
    r"""Each line without its end, \n, \r\n or \r, the first without a byte-order mark; of a device `ValueError`."""
    if path.is_char_device():
        raise ValueError("it is a device, not a file")  # /dev/zero has no line's end
    with OPENERS.get(path.suffix.lower(), io.FileIO)(path) as file:
        for number, line in enumerate(io.BufferedReader(_Raw(file), 2**16)):
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            if "\r" in text:
                yield from io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")
            else:
                yield text.removesuffix("\n")


class _Raw(io.RawIOBase):
    """Python's and Arrow's streams alike, to be buffered and read by lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _batches(values: Iterable[Any], start: int) -> Rows:
    """From `start` on; what was read before a fault is given out first, so that the fault's row is known."""
    rest = itertools.islice(values, start, None)
    fault: Exception | None = None
    while fault is None:
        batch: list[Any] = []
        try:
            for value in itertools.islice(rest, ROWS_AT_ONCE):
                batch.append(value)
        except _FAULTS as error:
            fault = error
        if batch:
            yield batch
        elif fault is None:
            return
    raise fault


def _read_text(path: Path, column: str, start: int) -> Rows:
    return _batches(lines_of(path), start)


def _read_csv(path: Path, column: str, start: int) -> Rows:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 KiB
    return _batches(_csv_values(path, column), start)


def _csv_values(path: Path, column: str) -> Iterator[str | None]:
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:])
    records = csv.reader((line + "\n" for line in lines_of(path)), delimiter="\t" if tabs else ",", strict=True)
    header = next(records, [])
    if column not in header:
        raise _NoColumnError(header)
    place = header.index(column)
    numbers, others = 0, False
    for record in filter(None, records):
        if len(record) > len(header):
            raise UsageError(f"it has {len(record)} fields, the header {len(header)}")
        value = record[place] if place < len(record) else None
        if value and not others:
            numbers, others = numbers + 1, not is_number(value)
            if numbers == ROWS_AT_ONCE and not others:
                raise DataError(f"the column {column!r} of {str(path)!r} holds numbers like {value!r}, not text")
        yield value
    if numbers and not others:
        raise DataError(f"the column {column!r} of {str(path)!r} holds nothing but numbers, not text")


def is_number(value: str) -> bool:
    """Whether a text is one."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def _read_json(path: Path, column: str, start: int) -> Rows:
    return _batches(_json_values(path, column), start)


def _json_values(path: Path, column: str) -> Iterator[Any]:
    seen, number = False, 0
    columns: list[str] = []
    for number, record in enumerate(json_records(path, column), 1):
        if not isinstance(record, dict):
            raise UsageError(f"{str(record)[:40]!r} is no record with columns")
        columns = columns or list(record)
        value = record.get(column)
        seen = seen or column in record  # a record may lack it, but not all of a file's first ones
        if not seen and number == ROWS_AT_ONCE:
            raise _NoColumnError(columns)
        if isinstance(value, str) and not value.isascii():
            value.encode()  # JSON can spell half of a surrogate pair, which is no text
        yield value
    if number and not seen:
        raise _NoColumnError(columns)


def json_records(path: Path, column: str) -> Iterator[Any]:
    """The records of a JSON file: a line each, one array, or one array in an object that lacks `column`."""
    lines = filter(str.strip, lines_of(path))
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    if second is None:
        yield from _within(json.loads(first), column)
        return
    try:
        record = json.loads(first)
    except ValueError:
        try:
            whole = json.loads("\n".join([first, second, *lines]))
        except ValueError:
            json.loads(first)  # the first line's fault tells more, unless it merely opens a bracket
            raise
        yield from _within(whole, column)
        return
    yield record
    for line in itertools.chain([second], lines):
        yield json.loads(line)


def _within(value: Any, column: str) -> list[Any]:
    """The records of a file that is one value: an array, an object around one or of columns, or a single record."""
    if isinstance(value, dict):
        if isinstance(cells := value.get(column), list):
            return [{column: cell} for cell in cells]
        arrays = [array for array in value.values() if isinstance(array, list)]
        if column not in value and len(arrays) == 1:
            return arrays[0]
        return [value]
    return value if isinstance(value, list) else [value]


def _read_parquet(path: Path, column: str, start: int) -> Rows:
    with pq.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow, column)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if start < count:
                yield from _cells(file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column]), column, start)
            start = max(0, start - count)


def _read_arrow(path: Path, column: str, start: int) -> Rows:
    with pa.OSFile(str(path)) as file:
        try:
            stream = pa.ipc.open_stream(file)
            schema, batches = stream.schema, iter(stream)
        except pa.ArrowInvalid:  # the other of Arrow's two formats
            table = pa.ipc.open_file(file)
            schema = table.schema
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        _check_column(path, schema, column)
        yield from _cells(batches, column, start)


def _cells(batches: Iterable[Any], column: str, start: int) -> Rows:
    for batch in batches:
        if start < len(batch):
            yield batch.column(column).slice(start).to_pylist()
        start = max(0, start - len(batch))


def _check_column(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise _NoColumnError(schema.names)
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        raise DataError(
            f"the column {column!r} of {str(path)!r} holds {kind}, not text; its columns: {list(schema.names)}"
        )


_READERS: dict[str, Callable[[Path, str, int], Rows]] = {
    "text": _read_text,
    "csv": _read_csv,
    "json": _read_json,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
