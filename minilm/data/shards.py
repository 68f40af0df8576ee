"""The shards of a stream's sources: files, or parts of a data set on the hub, each read from any row on."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import datasets

from minilm.data.cache import load_train_split
from minilm.data.faults import DataError, faults_at
from minilm.data.files import Chosen
from minilm.data.formats import ROWS_AT_ONCE
from minilm.data.reading import checked, read_rows, try_file
from minilm.errors import UsageError


class Shard(NamedTuple):
    """One file of a source, from a row on, without some texts."""

    read: Callable[[int], Iterator[list[str | DataError | None]]]  # the column's values from a row on, some at a time
    first_row: int = 0
    without: frozenset[str] = frozenset()  # the held-out texts, which may stand in the data twice

    def texts(self, row: int = 0) -> Iterator[tuple[str | DataError, int]]:
        """The texts from `row` on that are not blank, each with the number of the row behind it.

        A row that cannot be read comes as what is wrong with it, where the source passes over such rows.
        """
        row = max(row, self.first_row)
        for values in self.read(row):
            for text in values:
                row += 1
                if isinstance(text, DataError) or (text and not text.isspace() and text not in self.without):
                    yield text, row


def shards_of(source: str, chosen: Chosen | None, config: str | None, column: str, skip: bool) -> list[Shard]:
    """The files of a source in their order, tried to have a text column.

    Args:
        skip: whether rows that cannot be read are passed over.
    """
    if chosen:
        sizes = [file.stat().st_size for file in chosen.files]
        for file in chosen.files:
            try_file(file, column, skip=skip)
        return [
            Shard(partial(read_rows, file, column, skip=skip, size=size))
            for file, size in zip(chosen.files, sizes, strict=True)
        ]
    rows = load_train_split(source, source, name=config, streaming=True)
    first = next(_hub_rows(rows, source, None, 0), None)
    if first is None:
        raise UsageError(f"{source!r} holds no text: it has no rows")
    if column not in first:
        raise UsageError(f"{source!r} has no column {column!r}; choose with --text_column from {list(first)}")
    rows = rows.select_columns([column])
    parts = [rows.shard(rows.num_shards, index) for index in range(rows.num_shards)]
    return [
        Shard(partial(_hub_texts, part, f"{source}, part {index}", column, skip)) for index, part in enumerate(parts)
    ]


def _hub_texts(rows: Any, name: str, column: str, skip: bool, start: int) -> Iterator[list[str | DataError | None]]:
    row = start
    for batch in _hub_rows(rows, name, ROWS_AT_ONCE, start):
        yield from checked(batch[column], name, column, row, skip)
        row += len(batch[column])


def _hub_rows(rows: Any, name: str, at_once: int | None, start: int) -> Iterator[Any]:
    """Rows of a `datasets.IterableDataset` from `start` on, one by one or in batches."""
    rows, row = rows.skip(start) if start else rows, start
    with faults_at(lambda: f"{name!r} after row {row}"):
        try:
            for batch in rows if at_once is None else rows.iter(batch_size=at_once):
                yield batch
                row += at_once or 1
        except (TypeError, datasets.exceptions.DatasetsError) as error:  # TypeError: a cast of Arrow's
            raise DataError(f"cannot read {name!r} after row {row}: {' '.join(str(error).split())}") from error
