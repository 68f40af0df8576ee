"""What is wrong with data, in one sentence with the place."""

import codecs
import csv
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa

from minilm.errors import UsageError

FAULTS = (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, lzma.LZMAError, pa.ArrowException)


class DataError(UsageError):
    """What stands in the data cannot be read: one sentence with the file and the row."""

    def __init__(self, sentence: str) -> None:
        # A loader's worker hands on its whole traceback, which ends with the sentence.
        super().__init__(sentence.rpartition(f"{type(self).__name__}: ")[2].strip())


@contextmanager
def faults_at(place: Callable[[], str]) -> Iterator[None]:
    """What goes wrong in reading as a `DataError` at `place()`."""
    try:
        yield
    except DataError:
        raise
    except FAULTS as error:
        raise DataError(f"cannot read {place()}: {_reason(error)}") from error


def bad_record(place: str, error: Exception) -> DataError:
    """What is wrong with one record, which could be passed over."""
    what = str(error) if isinstance(error, DataError) else f"cannot read {place}: {_reason(error)}"
    return DataError(f"{what}; --on_bad_record skip passes over such rows")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return (
            f"the byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, for example by "
            f"iconv -f {_encoding(error.object)} -t utf-8"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg} at character {error.colno})"
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def _encoding(line: bytes) -> str:
    """What a line that is not UTF-8 may be in: a file's first one tells it by its byte-order mark."""
    marks = {
        codecs.BOM_UTF32_LE: "utf-32",  # before the UTF-16 mark that it begins with
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    return next((encoding for mark, encoding in marks.items() if line.startswith(mark)), "latin1")
