"""The splits of a task as files: train.parquet, validation.csv, test-00000-of-00002.parquet and so on.

A split is called as on the hub (train, validation, validation_matched, test), validation also dev, val or valid. It is
one file or numbered parts; SQuAD's own files keep their names, train-v2.0.json and dev-v2.0.json. Types are the files'
own: what a CSV file writes as numbers are numbers.
"""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable

from minilm.data.faults import DataError, faults_at
from minilm.data.formats import json_records
from minilm.data.reading import kind_of

_FILE = re.compile(r"(train|test|validation|dev|val|valid)(_[a-z]+)?(-\d+-of-\d+|-v\d)?")
_VALIDATION = ("dev", "val", "valid")


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder, sorted; empty where it has none.

    Raises:
        DataError: a split in two kinds of files.
        OSError: a folder that cannot be listed.
    """
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name.partition(".")[0])
        if match and kind_of(path) in ("csv", "json", "parquet"):
            word = "validation" if match[1] in _VALIDATION else match[1]
            splits.setdefault(word + (match[2] or ""), []).append(path)
    for split, (first, *others) in splits.items():
        for other in others:
            if other.suffixes != first.suffixes or "-of-" not in other.name:
                raise DataError(
                    f"{str(folder)!r} has the split {split!r} twice, as {first.name} and {other.name}: remove one"
                )
    return splits


def read_split(files: list[Path], column: str) -> Dataset:
    """The records of a split, in memory. Raises `DataError` for what cannot be read.

    Args:
        column: one that its records have, which tells records within a JSON file from what stands around them.
    """
    return concatenate_datasets([_read(path, column) for path in files])


def _read(path: Path, column: str) -> Dataset:
    with faults_at(lambda: repr(str(path))):
        if kind_of(path) == "json":
            records = list(json_records(path, column))
            if other := next((record for record in records if not isinstance(record, dict)), None):
                raise DataError(f"{str(path)!r} holds {str(other)[:40]!r}, which is no record with columns")
            return Dataset.from_list(records)
        if kind_of(path) == "parquet":
            return _dataset(path, pq.read_table(path))
        tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:])
        parsing = pa_csv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True)
        return _dataset(path, pa_csv.read_csv(path, parse_options=parsing))


def _dataset(path: Path, table: pa.Table) -> Dataset:
    names = table.column_names
    if double := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{str(path)!r} has two columns {double!r}")
    return Dataset(InMemoryTable(table))
