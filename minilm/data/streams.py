"""Text as an endless stream of batches, for data too large to index, that continues bitwise from a small state.

Readers. The stream of a rank is read by its loader's workers (with no workers, by the process itself); reader
rank * workers + worker is one of world_size * workers. In each pass over a source its shards (files) are permuted by
(seed, pass) and dealt out to the readers; where there are fewer shards than readers, every reader reads all and keeps
every n-th text.

Shuffling is by blocks, not by a rolling buffer: a reader reads `shuffle_buffer` texts, permutes them by (seed, pass,
reader, number of the block) and yields them before it reads on. So no generator has a state to keep, and a reader's
position is a few integers: where its block begins, and how far in it is. The next text is drawn from source i with
probability w_i / sum(w), by (seed, reader, count); without weights, the shards of all sources are one source.

Each batch carries its reader's state after it in "stream_state", so that whoever consumes the batches knows the exact
position of each worker, however far the workers have read ahead.

Not `datasets.IterableDataset`: its `load_state_dict` begins with an empty shuffle buffer, so that the texts which were
in it are never trained on (4 of 40 with a buffer of 8), and a resumed run is another one.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from minilm.data.encoding import encode
from minilm.data.faults import DataError
from minilm.data.packing import Packer, PackingCollator, Row, row_features
from minilm.data.passes import CHOICE, Position, Source
from minilm.data.shards import Shard, shards_of
from minilm.data.texts import (
    HELDOUT_MAX,
    HELDOUT_SHARE,
    Found,
    OnBadRecord,
    find_sources,
    heldout_size,
    mixing_shares,
)
from minilm.errors import UsageError

TEXTS_AT_ONCE = 32  # tokenised together for packing
CHOICES_AT_ONCE = 1024  # of the source, from one generator

Batch = dict[str, Any]


class Parts(NamedTuple):
    """A source's held-out texts, its shards without them, and how many texts these have (infinity: many)."""

    heldout: list[str]
    shards: list[Shard]
    left: float
    bad: int  # rows that could not be read, before the last held-out text


class TextStream(IterableDataset[Batch]):
    """Endless tokenised micro-batches of one rank, from files, folders or names on the hub.

    Made for `loader()`; iterated by itself it is the one reader of its rank. A batch is what the tokenizer gives for
    `batch_size` texts (`input_ids` and `attention_mask` (B, N) int64, padded to the longest), or with `packing` what
    `PackingCollator` gives for `batch_size` rows; and "stream_state", a JSON-able dict for `load_state`.

    The first texts of the sources are never read for training: they are the attribute `heldout`, a `datasets.Dataset`
    with the column "text". Of `heldout` texts each source gives its share (by weight, else equal parts), but a source
    found to be shorter than 20 times that only one text in twenty. Copies of them are passed over.

    Every file is opened, and its first rows are tried, before anything is read for training. In "stream_state" stands
    how many rows of the first pass the reader has passed over, "bad"; `heldout_bad` are those among the held-out texts.

    Args:
        sources, config, text_column: as for `minilm.data.texts.load_texts`.
        tokenizer: it truncates to `max_length` tokens.
        batch_size: rows of a micro-batch.
        max_length: tokens of a text, or of a packed row, at most.
        weights: of the sources; None makes them one.
        packing: whether rows hold several texts.
        shuffle_buffer: texts that are permuted together. Each reader holds so many for each weight.
        seed: not negative; the same on every rank.
        rank, world_size: of the process among those that train together.
        num_workers: of the loader.
        heldout: how many texts to hold out.
        found, on_bad_record: as for `minilm.data.texts.split_texts`. A stream may go on with another `on_bad_record`.

    Raises:
        DataError: from an iteration, what cannot be read; one sentence with the file and the row.
        ValueError: as `minilm.data.texts.load_splits`; fewer texts than readers, where the source is short enough to
            count.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        config: str | None = None,
        text_column: str = "text",
        weights: Sequence[float] | None = None,
        packing: bool = False,
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        heldout: int = HELDOUT_MAX,
        found: Found | None = None,
        on_bad_record: OnBadRecord = "stop",
    ) -> None:
        shares = mixing_shares(sources, weights if weights is not None else [1] * len(sources))
        _check_sizes(batch_size=batch_size, shuffle_buffer=shuffle_buffer)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.packing = packing
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.rank = rank
        self.num_workers = num_workers
        self.readers = world_size * self._workers
        files_of, skip = found or find_sources(sources), on_bad_record == "skip"
        shards = [shards_of(source, files, config, text_column, skip) for source, files in files_of.items()]
        parts = [
            _hold_out(source, text_column, files, max(1, round(share * heldout)))
            for source, files, share in zip(sources, shards, shares, strict=True)
        ]
        self.heldout = datasets.Dataset.from_dict({"text": [text for part in parts for text in part.heldout]})
        self.heldout_bad = sum(part.bad for part in parts)
        without = frozenset(self.heldout["text"])
        self._sources = [[shard._replace(without=without) for shard in part.shards] for part in parts]
        self._shares = shares if weights is not None else [1.0]
        if weights is None:
            self._sources = [list(itertools.chain(*self._sources))]
        _check_readers([part.left for part in parts], self.readers, mixed=weights is not None)
        self._settings = {
            "sources": list(sources),
            "config": config,
            "text_column": text_column,
            "files": [len(shards) for shards in self._sources],
            "weights": None if weights is None else list(weights),
            "heldout": heldout,
            "packing": packing,
            "batch_size": batch_size,
            "max_length": max_length,
            "shuffle_buffer": shuffle_buffer,
            "seed": seed,
            "readers": self.readers,
        }
        self._states: dict[int, dict[str, Any]] = {}  # to go on from, by worker

    @property
    def _workers(self) -> int:
        return max(1, self.num_workers)

    def loader(self, *, pin_memory: bool = False) -> DataLoader[Batch]:
        """The loader whose workers are the readers of this rank."""
        return DataLoader(
            self,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # the loader would else advance the global one
        )

    def load_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Makes the next iteration go on behind the last batch consumed.

        Args:
            states: the "stream_state" of the newest batch that this rank consumed of each worker, in any order; none of
                a worker whose turn had not come.

        Raises:
            ValueError: a state of a stream with other settings, or not those of one moment on this rank.
        """
        for state in states:
            for name, value in self._settings.items():
                if state["settings"][name] != value:
                    raise UsageError(
                        f"cannot resume the stream: its {name} is {value!r}, the state's {state['settings'][name]!r}"
                    )
        first = self.rank * self._workers
        batches = {state["reader"] - first: state["batches"] for state in states}
        total = sum(batches.values())
        in_turn = {worker: -((worker - total) // self._workers) for worker in range(min(total, self._workers))}
        if batches != in_turn:
            given = {first + worker: count for worker, count in batches.items()}
            wanted = {first + worker: count for worker, count in in_turn.items()}
            raise UsageError(
                f"cannot resume the stream: the states are of batches {given} by reader; on rank {self.rank} after "
                f"{total} batches they must be of {wanted}"
            )
        self._states = {state["reader"] - first: state for state in states}

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        if info is not None and info.num_workers != self._workers:
            raise UsageError(f"the loader has {info.num_workers} workers, the stream was made for {self.num_workers}")
        # A loader takes batches from its workers in turn, beginning with the first: that one must be whose turn it is.
        consumed = sum(state["batches"] for state in self._states.values())
        worker = ((info.id if info else 0) + consumed) % self._workers
        return self._read(self.rank * self._workers + worker, self._states.get(worker))

    def _read(self, reader: int, state: dict[str, Any] | None) -> Iterator[Batch]:
        state = state or {"batches": 0, "drawn": 0, "positions": [{}] * len(self._sources), "rows": "[[], []]"}
        sources = [
            Source(shards, self.seed, number, reader, self.readers, self.shuffle_buffer, Position(**position))
            for number, (shards, position) in enumerate(zip(self._sources, state["positions"], strict=True))
        ]
        texts = self._draw([iter(source) for source in sources], reader, state["drawn"])
        drawn, batches = state["drawn"], state["batches"]
        closed, open_rows = json.loads(state["rows"])
        packer = Packer(self.max_length, open_rows)
        collate = PackingCollator(self.tokenizer.pad_token_id, self.max_length) if self.packing else None
        while True:
            if collate is None:
                batch = self._encode(list(itertools.islice(texts, self.batch_size)), padding=True, return_tensors="pt")
                drawn += self.batch_size
            else:
                while len(closed) < self.batch_size:
                    encoded = self._encode(list(itertools.islice(texts, TEXTS_AT_ONCE)))
                    drawn += TEXTS_AT_ONCE
                    closed += [row for sequence in encoded["input_ids"] for row in packer.add(sequence)]
                batch = dict(collate([row_features(row) for row in closed[: self.batch_size]]))
                closed = closed[self.batch_size :]
            batches += 1
            batch["stream_state"] = {
                "settings": self._settings,
                "reader": reader,
                "batches": batches,
                "drawn": drawn,
                "positions": [asdict(source.position) for source in sources],
                "bad": sum(source.bad for source in sources),
                "rows": _as_text(closed, packer.rows),
            }
            yield batch

    def _draw(self, sources: list[Iterator[str]], reader: int, drawn: int) -> Iterator[str]:
        for window in itertools.count(drawn // CHOICES_AT_ONCE):
            generator = np.random.default_rng([CHOICE, self.seed, reader, window])
            choices = generator.choice(len(sources), size=CHOICES_AT_ONCE, p=self._shares)
            for choice in choices[max(0, drawn - window * CHOICES_AT_ONCE) :]:
                yield next(sources[choice])

    def _encode(self, texts: list[str], **options: Any) -> Batch:
        return dict(encode(self.tokenizer, texts, max_length=self.max_length, **options))


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")


def _check_readers(lefts: list[float], readers: int, *, mixed: bool) -> None:
    """Raises `ValueError` if a source, or all that are one, has fewer texts left to train on than there are readers."""
    for left in lefts if mixed else [sum(lefts)]:
        if left < readers:
            raise UsageError(f"a source has {left} texts to train on, fewer than the stream's {readers} readers")


def _hold_out(source: str, column: str, shards: list[Shard], most: int) -> Parts:
    """Takes the first texts of the source out of it: `most`, or one in twenty."""
    enough = int(most / HELDOUT_SHARE)
    bad: list[tuple[int, int]] = []

    def texts() -> Iterator[tuple[str, int, int]]:
        for index, shard in enumerate(shards):
            for text, row in shard.texts():
                if isinstance(text, DataError):
                    bad.append((index, row))
                else:
                    yield text, index, row

    every_text = texts()
    ahead = list(itertools.islice(every_text, most))
    ahead += itertools.islice(every_text, enough - len(ahead))
    count = len(ahead)
    if not count:
        unread = f", {len(bad)} of them cannot be read" if bad else ""
        raise UsageError(f"{source!r} holds no text: all rows of its column {column!r} are empty{unread}")
    held = ahead[: heldout_size(count, most)]
    _, last, row = held[-1]
    rest = [shards[last]._replace(first_row=row), *shards[last + 1 :]]
    heldout = [text for text, _, _ in held]
    left = sum(text not in heldout for text, _, _ in ahead)
    return Parts(heldout, rest, left if count < enough else math.inf, sum(place <= (last, row) for place in bad))


def _as_text(closed: list[Row], open_rows: list[Row]) -> str:
    # One string: what walks through a batch (pinning, moving to a device) need not walk through each token.
    return json.dumps([closed, open_rows], separators=(",", ":"))


def _unchanged(batch: Any) -> Any:
    return batch
