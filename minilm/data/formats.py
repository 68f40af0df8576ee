"""What a file of each kind holds, row by row; a row that alone cannot be read is given as its exception.

What is wrong with the whole file, or hides where the next row begins, is raised.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minilm.data.faults import FAULTS, DataError
from minilm.errors import UsageError

ROWS_AT_ONCE = 256  # many enough to be fast, few enough to hold
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}

Rows = Iterator[list[Any]]


class NoColumnError(ValueError):
    """A file has other columns, `columns`."""

    def __init__(self, columns: list[str]) -> None:
        super().__init__(columns)
        self.columns = columns


def lines_of(path: Path, errors: str = "strict") -> Iterator[str]:
    r"""Each line without its end, \n, \r\n or \r, the first without a byte-order mark.

    Args:
        errors: of decoding; what "surrogateescape" lets through `_undecodable` finds.

    Raises:
        ValueError: `path` is a device.
    """
    if path.is_char_device():
        raise ValueError("it is a device, not a file")  # /dev/zero has no line's end
    with OPENERS.get(path.suffix.lower(), io.FileIO)(path) as file:
        for number, line in enumerate(io.BufferedReader(_Raw(file), 2**16)):
            text = line.decode("utf-8-sig" if number == 0 else "utf-8", errors)
            if "\r" in text:
                yield from io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")
            else:
                yield text.removesuffix("\n")


def _undecodable(text: str) -> UnicodeDecodeError | None:
    """What is wrong with the bytes of a text that was decoded with "surrogateescape"."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return error
    return None


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
        except FAULTS as error:
            fault = error
        if batch:
            yield batch
        elif fault is None:
            return
    raise fault


def _read_text(path: Path, column: str, start: int) -> Rows:
    return _batches((_undecodable(line) or line for line in lines_of(path, "surrogateescape")), start)


def _read_csv(path: Path, column: str, start: int) -> Rows:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 KiB
    return _batches(_csv_values(path, column), start)


def _csv_values(path: Path, column: str) -> Iterator[str | Exception | None]:
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:])
    lines = (line + "\n" for line in lines_of(path, "surrogateescape"))
    records = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    header = next(records, [])
    if fault := _undecodable("".join(header)):
        raise fault
    if column not in header:
        raise NoColumnError(header)
    place = header.index(column)
    numbers, others = 0, False
    for record in _csv_records(records):
        if isinstance(record, csv.Error):
            yield record
        elif fault := _undecodable("".join(record)):
            yield fault
        elif len(record) > len(header):
            yield UsageError(f"it has {len(record)} fields, the header {len(header)}")
        else:
            value = record[place] if place < len(record) else None
            if value and not others:
                numbers, others = numbers + 1, not is_number(value)
                if numbers == ROWS_AT_ONCE and not others:
                    raise DataError(f"the column {column!r} of {str(path)!r} holds numbers like {value!r}, not text")
            yield value
    if numbers and not others:
        raise DataError(f"the column {column!r} of {str(path)!r} holds nothing but numbers, not text")


def _csv_records(records: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    """A record that is wrong within its line as its error; raises one that has swallowed the rest of the file."""
    while True:
        try:
            record = next(records, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise
            yield error
            continue
        if record is None:
            return
        if record:
            yield record


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
    for number, record in enumerate(_json_records(path, column), 1):
        value: Any = record
        if isinstance(record, dict):
            columns = columns or list(record)
            value = record.get(column)
            seen = seen or column in record  # a record may lack it, but not all of a file's first ones
            if isinstance(value, str):
                value = _half_of_a_pair(value) or value
        elif not isinstance(record, Exception):
            value = UsageError(f"{str(record)[:40]!r} is no record with columns")
        if columns and not seen and number == ROWS_AT_ONCE:
            raise NoColumnError(columns)
        yield value
    if columns and not seen:
        raise NoColumnError(columns)


def _half_of_a_pair(text: str) -> UnicodeEncodeError | None:
    """JSON can spell half of a surrogate pair, which is no text."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error
    return None


def json_records(path: Path, column: str) -> Iterator[Any]:
    """The records of a JSON file: a line each, one array, or one array in an object that lacks `column`."""
    for record in _json_records(path, column):
        if isinstance(record, Exception):
            raise record
        yield record


def _json_records(path: Path, column: str) -> Iterator[Any]:
    """A line that cannot be read as its error."""
    lines: Iterator[str] = filter(str.strip, lines_of(path, "surrogateescape"))
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    if second is None:
        yield from _within(_loads(first), column)
        return
    record = _parsed(first)
    lines = itertools.chain([second], lines)
    if isinstance(record, Exception):
        rest = list(lines)
        whole = _parsed("\n".join([first, *rest]))
        if not isinstance(whole, Exception):
            yield from _within(whole, column)
            return
        lines = iter(rest)
    yield record
    yield from map(_parsed, lines)


def _parsed(text: str) -> Any:
    try:
        return _loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _loads(text: str) -> Any:
    if fault := _undecodable(text):
        raise fault
    return json.loads(text)


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
        check_column(path, file.schema_arrow, column)
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
        check_column(path, schema, column)
        yield from _cells(batches, column, start)


def _cells(batches: Iterable[Any], column: str, start: int) -> Rows:
    for batch in batches:
        if start < len(batch):
            yield _cell_values(batch.column(column).slice(start))
        start = max(0, start - len(batch))


def _cell_values(cells: Any) -> list[Any]:
    try:
        return list(cells.to_pylist())
    except UnicodeDecodeError:
        return [_cell_value(cell) for cell in cells]


def _cell_value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error


def check_column(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise NoColumnError(schema.names)
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        raise DataError(
            f"the column {column!r} of {str(path)!r} holds {kind}, not text; its columns: {list(schema.names)}"
        )


READERS: dict[str, Callable[[Path, str, int], Rows]] = {
    "text": _read_text,
    "csv": _read_csv,
    "json": _read_json,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
