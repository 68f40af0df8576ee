"""Packing: several sequences in one row of at most `max_length` tokens, instead of one and padding.

Best-fit with a bounded number of open rows: a sequence goes to the open row in which it leaves the least room; where
it fits none, a row is opened, and beyond OPEN_ROWS of them the fullest is closed. Sequences are never split, each keeps
its own special tokens, and the same sequences in the same order give the same rows.

Packed sequences must not see each other: `PackingCollator` tells them apart, `minilm.models.batches` keeps them so.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from minilm.errors import UsageError

OPEN_ROWS = 32  # texts of 5 to 120 tokens fill rows of 128 to 97 %; without a bound it is 98 %, at 8 it is 93 %
WINDOW = 4096  # sequences of an indexed data set that are packed together, in one process's memory

Row = list[list[int]]  # the sequences of a row


class Packer:
    """Packs a stream of sequences; what it still holds, `rows`, is all its state.

    A sequence may stay in an open row for long, while rows that fill sooner overtake it.

    Args:
        max_length: tokens of a row, at most.
        rows: open rows to go on with.
    """

    def __init__(self, max_length: int, rows: Iterable[Row] = ()) -> None:
        self.max_length = max_length
        self._rows = [list(row) for row in rows]
        self._room = [max_length - sum(map(len, row)) for row in self._rows]

    @property
    def rows(self) -> list[Row]:
        """The open rows, apart from the packer's own lists."""
        return [list(row) for row in self._rows]

    def add(self, sequence: list[int]) -> list[Row]:
        """Takes a sequence in (one without tokens is dropped); returns the rows that this closes, two at most.

        Raises:
            ValueError: a sequence longer than a row.
        """
        size = len(sequence)
        if not size:
            return []
        if size > self.max_length:
            raise UsageError(f"a sequence of {size} tokens does not fit a row of {self.max_length}")
        closed = []
        fitting = [(room, index) for index, room in enumerate(self._room) if room >= size]
        if fitting:
            _, index = min(fitting)
        else:
            if len(self._rows) == OPEN_ROWS:
                closed.append(self._close(self._room.index(min(self._room))))
            index = len(self._rows)
            self._rows.append([])
            self._room.append(self.max_length)
        self._rows[index].append(sequence)
        self._room[index] -= size
        if not self._room[index]:
            closed.append(self._close(index))
        return closed

    def flush(self) -> list[Row]:
        """Closes the open rows."""
        return [self._close(0) for _ in range(len(self._rows))]

    def _close(self, index: int) -> Row:
        del self._room[index]
        return self._rows.pop(index)


def pack(sequences: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Rows of the sequences in the column "input_ids", cached as `datasets` does.

    Returns:
        A data set with "input_ids", a row's tokens without padding, and "lengths", those of its sequences in order.

    Raises:
        ValueError: a sequence longer than `max_length` tokens.
    """
    return sequences.map(
        _pack_window,
        batched=True,
        batch_size=WINDOW,
        fn_kwargs={"max_length": max_length},
        remove_columns=sequences.column_names,
        features=datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int32")), "lengths": datasets.List(datasets.Value("int32"))}
        ),
        desc="packing",
    )


def _pack_window(window: Mapping[str, list[list[int]]], max_length: int) -> dict[str, list[list[int]]]:
    packer = Packer(max_length)
    rows = [row for sequence in window["input_ids"] for row in packer.add(sequence)] + packer.flush()
    features = [row_features(row) for row in rows]
    return {name: [feature[name] for feature in features] for name in ("input_ids", "lengths")}


def row_features(row: Row) -> dict[str, list[int]]:
    """A row as `PackingCollator` takes it."""
    return {"input_ids": [token for sequence in row for token in sequence], "lengths": [len(part) for part in row]}


class PackingCollator:
    """Collates packed rows, each {"input_ids": its tokens, "lengths": those of its sequences}, into a batch.

    Returns of B rows with L = `max_length`, S sequences and T tokens in all:
        input_ids: (B, L) int64, padded on the right.
        position_ids: (B, L) int64, 0, 1, ... in each sequence, 0 at padding.
        sequence_ids: (B, L) int32, 1, 2, ... within the row, 0 at padding.
        cu_seqlens: (S + 1,) int32, where each sequence begins among all rows' tokens without padding, and T.
        token_index: (T,) int64, where those tokens stand in the flattened (B * L).
    """

    def __init__(self, pad_token_id: int, max_length: int) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        shape = len(rows), self.max_length
        input_ids = torch.full(shape, self.pad_token_id)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        sequence_ids = torch.zeros(shape, dtype=torch.int32)
        for index, row in enumerate(rows):
            lengths = torch.as_tensor(row["lengths"])
            size = int(lengths.sum())
            if size > self.max_length:
                raise UsageError(f"a row of {size} tokens does not fit the max_length of {self.max_length}")
            number = torch.repeat_interleave(lengths)  # of its sequence, from 0, for each token
            input_ids[index, :size] = torch.as_tensor(row["input_ids"])
            position_ids[index, :size] = torch.arange(size) - (lengths.cumsum(0) - lengths)[number]
            sequence_ids[index, :size] = number + 1
        all_lengths = torch.tensor([0, *(length for row in rows for length in row["lengths"])])
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "sequence_ids": sequence_ids,
            "cu_seqlens": all_lengths.cumsum(0).to(torch.int32),
            "token_index": sequence_ids.flatten().nonzero().flatten(),
        }
