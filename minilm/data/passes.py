"""The texts of one source for one reader, pass after pass, from a small state on; `minilm.data.streams` says how."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from minilm.data.faults import DataError
from minilm.data.shards import Shard

MAX_EMPTY_PASSES = 100  # a reader may be dealt empty files in one pass, hardly in a hundred
SHARDS, BLOCK, CHOICE = 0, 1, 2  # what a generator is for, first in its seed


@dataclass(frozen=True)
class Position:
    """Where a reader is in a source: where its block begins, in the order of the pass, and how far in it is."""

    epoch: int = 0  # passes over the source that are finished
    block: int = 0
    shard: int = 0
    row: int = 0
    seen: int = 0  # texts of the pass before the block, those of other readers included
    index: int = 0  # texts of the block that were yielded
    bad: int = 0  # this reader's rows of the first pass before the block that could not be read


class Source:
    """The texts of one source for one reader, endless. `position` is all its state.

    `bad` counts its rows that could not be read, in the first pass up to where it has read.
    """

    def __init__(
        self, shards: list[Shard], seed: int, number: int, reader: int, readers: int, buffer: int, position: Position
    ) -> None:
        self.shards = shards
        self.seed = seed
        self.number = number
        self.reader = reader
        self.readers = readers
        self.buffer = buffer
        self.position = position
        self.bad = position.bad

    def __iter__(self) -> Iterator[str]:
        empty_passes = 0
        while empty_passes < MAX_EMPTY_PASSES:
            empty = self.position == Position(self.position.epoch, bad=self.position.bad)
            rest = self._rest_of_pass()
            while block := list(itertools.islice(rest, self.buffer)):
                empty = False
                seed = [BLOCK, self.seed, self.number, self.position.epoch, self.reader, self.position.block]
                order = np.random.default_rng(seed).permutation(len(block))
                for place in order[self.position.index :]:
                    self.position = replace(self.position, index=self.position.index + 1)
                    yield block[place][0]
                self.position = replace(block[-1][1], block=self.position.block + 1)
            self.position = Position(self.position.epoch + 1, bad=self.bad)
            empty_passes = empty_passes + 1 if empty else 0
        raise DataError(
            f"reader {self.reader} of {self.readers} found no text in {empty_passes} passes over {len(self.shards)} "
            "files: take fewer data loader workers"
        )

    def _rest_of_pass(self) -> Iterator[tuple[str, Position]]:
        """This reader's texts from the block's beginning on, each with the position behind it."""
        start = self.position
        order = np.random.default_rng([SHARDS, self.seed, self.number, start.epoch]).permutation(len(self.shards))
        dealt = len(self.shards) >= self.readers
        if dealt:
            order = order[self.reader :: self.readers]
        seen = start.seen
        for place in range(start.shard, len(order)):
            for text, row in self.shards[order[place]].texts(start.row if place == start.shard else 0):
                is_own = dealt or (seen + 1) % self.readers == self.reader
                if isinstance(text, DataError):
                    self.bad += is_own and start.epoch == 0
                    continue
                seen += 1
                if is_own:
                    yield text, Position(start.epoch, shard=place, row=row, seen=seen, bad=self.bad)
