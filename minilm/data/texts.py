"""Text from files, folders or the hub, as tokenised sequences and a held-out part.

A row of the text column is one text: a line of a .txt file, a record of a .jsonl or .parquet file
(`minilm.data.reading` reads them, `minilm.data.files` chooses those of a folder). With a column of pairs it is the
first of two texts that make one sequence. Blank texts are dropped; a sequence longer than `max_length` tokens is
truncated. What was read and tokenised once `datasets` keeps in its cache, by file and settings;
`minilm.data.streams` reads what is too large for that.

Several sources follow each other, or are mixed by weights: each text is drawn from source i with probability
w_i / sum(w), until every source was seen whole; smaller ones repeat.
"""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from minilm.data.cache import cache_error, cache_faults, fingerprint_hub, load_train_split
from minilm.data.encoding import encode
from minilm.data.faults import DataError
from minilm.data.files import Chosen, choose_files
from minilm.data.fingerprints import fingerprint_files
from minilm.data.reading import KINDS, kind_of, read_rows
from minilm.errors import UsageError

COLUMNS = ("text", "pair")  # of what is loaded
FLAGS = ("text_column", "text_pair_column")  # that name where they stand
HELDOUT_SHARE, HELDOUT_MAX = 0.05, 512  # enough for a mean to two digits, little enough to evaluate often


OnBadRecord = Literal["stop", "skip"]  # what is done at a row that cannot be read
Found = dict[str, Chosen | None]  # the files of each source that are read, None of a name on the hub


class Splits(NamedTuple):
    """Sequences to train on and held out."""

    train: datasets.Dataset
    heldout: datasets.Dataset
    copies: int  # of held-out texts, which are left out of training


class Texts(NamedTuple):
    """Texts to train on, a data set for each weight, and held out, in the column "text"."""

    trains: list[datasets.Dataset]
    heldout: datasets.Dataset
    copies: int = 0  # of held-out texts, which are left out of training
    shares: list[float] | None = None  # by which the data sets are mixed
    bad_records: int = 0  # rows that cannot be read, which were passed over

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Splits:
        """Sequences as `tokenize` gives them, mixed. Raises `OSError` if the cache of `datasets` cannot be written."""
        with cache_faults():
            sequences = [tokenize(train, tokenizer, max_length) for train in self.trains]
            held = tokenize(self.heldout, tokenizer, max_length)
            if self.shares is None:
                return Splits(sequences[0], held, self.copies)
            mixed = datasets.interleave_datasets(sequences, self.shares, seed=0, stopping_strategy="all_exhausted")
        return Splits(mixed, held, self.copies)


def load_texts(sources: Sequence[str], *, config: str | None = None, text_column: str = "text") -> datasets.Dataset:
    """All texts of the sources, in their order, as a data set with the one column "text".

    Args:
        sources: each a file that `minilm.data.reading` reads, a folder of which `minilm.data.files` chooses files, or
            a data set's name on the hub, whose train split is read.
        config: the configuration of a hub name ("wikitext-2-raw-v1").
        text_column: where the text stands; a .txt file needs none.

    Raises:
        ValueError: nothing there, another kind of file, no such column, no text in it, a file given twice.
        OSError: the cache of `datasets` cannot be written.
    """
    parts = [_load(source, chosen, config, (text_column,)) for source, chosen in find_sources(sources).items()]
    return _concatenated([part.texts for part in parts])


def load_splits(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, **where: Any) -> Splits:
    """Sequences of the texts that `split_texts` gives for the same arguments; raises as it and `Texts.tokenize`."""
    return split_texts(sources, **where).tokenize(tokenizer, max_length)


def split_texts(
    sources: Sequence[str],
    *,
    config: str | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    weights: Sequence[float] | None = None,
    found: Found | None = None,
    on_bad_record: OnBadRecord = "stop",
) -> Texts:
    """Texts of the sources, the training ones to be mixed by the weights.

    No held-out text is trained on, not as a copy either. With weights the held-out part is taken from each source by
    its weight, before anything repeats.

    Args:
        pair_column: where a second text stands that follows the first one in its sequence.
        found: what `find_sources` has found of the sources, to list no folder twice.
        on_bad_record: of a file, if the rest of the file can be read all the same; "skip" counts it.

    Raises:
        ValueError: as `load_texts`; a number of weights that is not that of the sources, or a weight that is not
            positive; fewer than two different texts.
        OSError: the cache of `datasets` cannot be written.
    """
    shares = None if weights is None else mixing_shares(sources, weights)
    found = find_sources(sources) if found is None else found
    columns = (text_column,) if pair_column is None else (text_column, pair_column)
    loaded = [_load(source, chosen, config, columns, on_bad_record == "skip") for source, chosen in found.items()]
    texts, bad_records = [part.texts for part in loaded], sum(part.bad_records for part in loaded)
    with cache_faults():
        if shares is None:
            parts = [split_heldout(_concatenated(texts))]
        else:
            sizes = [max(1, round(share * HELDOUT_MAX)) for share in shares]
            parts = [split_heldout(some, size) for some, size in zip(texts, sizes, strict=True)]
        heldout = datasets.concatenate_datasets([part for _, part in parts])
        trains = [without_copies(train, heldout) for train, _ in parts]
    copies = sum(len(train) - len(rest) for (train, _), rest in zip(parts, trains, strict=True))
    return Texts(trains, heldout, copies, shares, bad_records)


def without_copies(train: datasets.Dataset, heldout: datasets.Dataset) -> datasets.Dataset:
    """The rows of `train` whose texts are not those of one of `heldout`. Raises `ValueError` if none is left."""
    texts = _joined(heldout.with_format("arrow")[:])
    kept: list[int] = []
    for number, batch in enumerate(train.with_format("arrow").iter(batch_size=10_000)):
        copies = pc.is_in(_joined(batch), value_set=texts).to_pylist()
        kept += [10_000 * number + place for place, copy in enumerate(copies) if not copy]
    if not kept:
        raise UsageError(f"all {len(train)} texts to train on are copies of the {len(heldout)} held-out ones")
    return train if len(kept) == len(train) else train.select(kept)


def _joined(rows: pa.Table) -> Any:
    """Of each row the text, or both of a pair in one string."""
    columns = [rows[name].cast(pa.string()) for name in COLUMNS if name in rows.column_names]
    return pc.binary_join_element_wise(*columns, "\0")


def mixing_shares(sources: Sequence[str], weights: Sequence[float]) -> list[float]:
    """The probability of each source. Raises `ValueError` as `load_splits` does for the weights."""
    if len(weights) != len(sources):
        raise UsageError(f"there are {len(weights)} weights for {len(sources)} sources of data")
    for weight, source in zip(weights, sources, strict=True):
        if not 0 < weight < math.inf:
            raise UsageError(f"the weight of {source!r} must be a positive number, not {weight}")
    largest = max(weights)  # first, because their sum may be infinite
    scaled = [weight / largest for weight in weights]
    return [weight / sum(scaled) for weight in scaled]


def split_heldout(texts: datasets.Dataset, most: int = HELDOUT_MAX) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training, held-out): one row in twenty, at most `most`, drawn the same way in every run whatever its seed.

    Raises:
        ValueError: fewer than two rows.
    """
    size = heldout_size(len(texts), most)
    halves = texts.train_test_split(test_size=size, seed=0)
    return halves["train"], halves["test"]


def heldout_size(count: int, most: int) -> int:
    """How many of `count` texts are held out: one in twenty, at least one, at most `most`; `ValueError` below two."""
    if count < 2:
        raise UsageError(f"the data hold {count} text; at least 2 are needed, one to train on and one held out")
    return min(most, max(1, int(HELDOUT_SHARE * count)))


def tokenize(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Each text or pair as one sequence of at most `max_length` tokens, special ones included, in the model's inputs.

    Of a pair that is too long the longer text is cut.
    """
    columns = [name for name in COLUMNS if name in texts.column_names]

    def encoded(rows: dict[str, list[str]]) -> Any:
        return encode(tokenizer, *(rows[name] for name in columns), max_length=max_length)

    # It leaves the truncation set: older `datasets` hash it with the tokenizer, for their cache.
    encoded({name: [""] for name in columns})
    return texts.map(encoded, batched=True, remove_columns=columns, desc="tokenising")


def find_files(source: str) -> Chosen | None:
    """The files of a source that are read; None of a name on the hub. Raises `ValueError` as `load_texts`."""
    path = Path(source)
    if not source:
        raise UsageError("the name of the data is empty: --data takes files, folders or names on the hub")
    chosen = Chosen([path], [])
    if path.is_dir():
        try:
            chosen = choose_files(path)
        except OSError as error:
            raise UsageError(f"cannot list the folder {str(error.filename)!r}: {error.strerror}") from error
    elif path.is_file():
        if kind_of(path) is None:
            raise UsageError(f"cannot read {source!r}: its suffix {path.suffix!r} is none of {', '.join(KINDS)}")
        if not path.stat().st_size:
            raise UsageError(f"{source!r} holds no text: the file is empty")
    elif path.exists():
        raise UsageError(f"{source!r} is neither a file nor a folder")
    elif kind_of(path) or path.is_absolute() or source.startswith("."):
        raise UsageError(f"there is no file or folder {source!r}")
    else:
        return None
    for file in chosen.files:
        if not str(file).isprintable() and any("\ud800" <= letter <= "\udfff" for letter in str(file)):
            raise UsageError(f"the file name {str(file)!r} is not UTF-8: rename it")
    return chosen


def find_sources(sources: Sequence[str]) -> Found:
    """`find_files` of each source. Raises `ValueError` as `load_texts`, and for what would be read twice."""
    seen: dict[str, str] = {}
    found: Found = {}
    for source in sources:
        found[source] = chosen = find_files(source)
        for file in [source] if chosen is None else map(os.path.realpath, chosen.files):
            if file in seen:
                where = "twice" if seen[file] == source else f"in {seen[file]!r} and in {source!r}"
                raise UsageError(
                    f"the data hold {file!r} {where}: name it once, --data_weights say how often it counts"
                )
            seen[file] = source
    return found


def fingerprint_source(source: str, chosen: Chosen | None, config: str | None) -> str:
    """What stands at a source, by the content of its files; of a data set on the hub its revision."""
    return fingerprint_hub(source, config) if chosen is None else fingerprint_files(chosen.files)


def _concatenated(texts: list[datasets.Dataset]) -> datasets.Dataset:
    return texts[0] if len(texts) == 1 else datasets.concatenate_datasets(texts)


class _Loaded(NamedTuple):
    texts: datasets.Dataset
    bad_records: int = 0


def _load(
    source: str, chosen: Chosen | None, config: str | None, columns: tuple[str, ...], skip: bool = False
) -> _Loaded:
    """The column "text", and "pair" where two columns are named."""
    if chosen:
        return _load_files(source, chosen.files, columns, skip)
    return _Loaded(_text_of(source, load_train_split(source, source, name=config), columns))


def _load_files(source: str, files: Sequence[Path], columns: tuple[str, ...], skip: bool) -> _Loaded:
    for file in files:
        if len(columns) > 1 and kind_of(file) == "text":
            raise UsageError(
                f"{str(file)!r} is plain text, which has no column {columns[1]!r}: leave out --text_pair_column"
            )
    # Tuples: of lists `datasets` makes shards. Times and sizes make it read again what has changed.
    stamps = tuple((os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    names = tuple(str(file) for file in files)
    given = {"source": source, "files": names, "columns": columns, "stamps": stamps, "skip": skip}
    try:
        with cache_faults():
            texts: datasets.Dataset = datasets.Dataset.from_generator(
                _texts,
                features=datasets.Features({name: datasets.Value("string") for name in COLUMNS[: len(columns)]}),
                gen_kwargs=given,
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):
            raise cache_error(error.__cause__) from error
        raise (error.__cause__ or error) from None
    bad = texts.data.column("text").null_count
    return _Loaded(texts.select(np.flatnonzero(texts.data.column("text").is_valid())) if bad else texts, bad)


def _texts(
    source: str, files: tuple[str, ...], columns: tuple[str, ...], stamps: object, skip: bool
) -> Iterator[dict[str, str | None]]:
    """A row that cannot be read has no text: so it is counted in the cache too."""
    count, rows = 0, 0
    for file in files:
        by_column = (
            chain.from_iterable(read_rows(Path(file), column, flag=flag, skip=skip))
            for column, flag in zip(columns, FLAGS, strict=False)
        )
        for values in zip(*by_column, strict=True):
            rows += 1
            texts = [value for value in values if isinstance(value, str) and not value.isspace() and value]
            if any(isinstance(value, DataError) for value in values):
                yield dict.fromkeys(COLUMNS[: len(columns)])
            elif len(texts) == len(columns):
                count += 1
                yield dict(zip(COLUMNS, texts, strict=False))
    if not count:
        raise _no_text(source, rows, columns, DataError, skip)


def _text_of(source: str, rows: datasets.Dataset, columns: tuple[str, ...]) -> datasets.Dataset:
    for column, flag in zip(columns, FLAGS, strict=False):
        if column not in rows.column_names:
            raise UsageError(f"{source!r} has no column {column!r}; choose with --{flag} from {rows.column_names}")
        feature = rows.features[column]
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise UsageError(
                f"the column {column!r} of {source!r} holds {feature}, not text; its columns: {rows.column_names}"
            )
    names = dict(zip(columns, COLUMNS, strict=False))
    texts = rows.select_columns(list(columns)).rename_columns(names)
    texts = texts.cast(datasets.Features({name: datasets.Value("string") for name in names.values()}))
    texts = texts.filter(
        lambda batch: [all(text and text.strip() for text in row) for row in zip(*batch.values(), strict=True)],
        batched=True,
    )
    if not len(texts):
        raise _no_text(source, len(rows), columns, UsageError)
    return texts


def _no_text(
    source: str, rows: int, columns: tuple[str, ...], kind: type[UsageError], skip: bool = False
) -> UsageError:
    named = " or ".join(map(repr, columns))
    what = "are empty or cannot be read" if skip else "are empty"
    return kind(f"{source!r} holds no text: all {rows} rows of its column {named} {what}")
