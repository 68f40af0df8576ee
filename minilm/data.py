"""Text from files, folders or the hub, as tokenised sequences and a held-out part.

A row of the text column is one text: a line of a .txt file, a record of a .jsonl or .parquet file. Blank texts are
dropped; a text longer than `max_length` tokens is truncated. What `datasets` has read and tokenised once it keeps in
its cache, by file and settings; `minilm.streams` reads what is too large for that.

Several sources follow each other, or are mixed by weights: each text is drawn from source i with probability
w_i / sum(w), until every source was seen whole; smaller ones repeat.
"""

import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from minilm.fingerprints import fingerprint_files

BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_SPLIT = re.compile(r"(train|training|valid|validation|val|dev|test|testing|eval|evaluation)(-\d+-of-\d+)?")
HELDOUT_SHARE, HELDOUT_MAX = 0.05, 512  # enough for a mean to two digits, little enough to evaluate often


def load_texts(sources: Sequence[str], *, config: str | None = None, text_column: str = "text") -> datasets.Dataset:
    """All texts of the sources, in their order, as a data set with the one column "text".

    Args:
        sources: each a .txt, .jsonl or .parquet file, a folder of one kind of them, or a data set's name on the hub,
            whose train split is read. Of a folder all files of that kind are read, unless every one of them is named by
            its split (train.txt, test-00000-of-00002.parquet, validation/a.jsonl): then those of training.
        config: the configuration of a hub name ("wikitext-2-raw-v1").
        text_column: where the text stands; a .txt file needs none.

    Raises:
        ValueError: nothing there, another kind of file, no such column, or no text in it.
    """
    parts = [_text_of(source, open_source(source, config), text_column) for source in sources]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def load_splits(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    config: str | None = None,
    text_column: str = "text",
    weights: Sequence[float] | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training, held-out) sequences of the sources, as `tokenize` gives them, the training ones mixed by the weights.

    With weights the held-out part is taken from each source by its weight, before anything repeats: no held-out text is
    trained on.

    Raises:
        ValueError: as `load_texts`; a number of weights that is not that of the sources, or a weight that is not
            positive; fewer than two texts.
    """
    if weights is None:
        texts = load_texts(sources, config=config, text_column=text_column)
        train, heldout = (tokenize(part, tokenizer, max_length) for part in split_heldout(texts))
        return train, heldout
    shares = mixing_shares(sources, weights)
    trains, heldouts = [], []
    for source, share in zip(sources, shares, strict=True):
        texts = load_texts([source], config=config, text_column=text_column)
        train, heldout = split_heldout(texts, max(1, round(share * HELDOUT_MAX)))
        trains.append(tokenize(train, tokenizer, max_length))
        heldouts.append(tokenize(heldout, tokenizer, max_length))
    mixed = datasets.interleave_datasets(trains, shares, seed=0, stopping_strategy="all_exhausted")
    return mixed, datasets.concatenate_datasets(heldouts)


def mixing_shares(sources: Sequence[str], weights: Sequence[float]) -> list[float]:
    """The probability of each source. Raises `ValueError` as `load_splits` does for the weights."""
    if len(weights) != len(sources):
        raise ValueError(f"there are {len(weights)} weights for {len(sources)} sources of data")
    for weight, source in zip(weights, sources, strict=True):
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {source!r} must be a positive number, not {weight}")
    return [weight / sum(weights) for weight in weights]


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
        raise ValueError(f"the data hold {count} text; at least 2 are needed, one to train on and one held out")
    return min(most, max(1, int(HELDOUT_SHARE * count)))


def tokenize(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Each text as one sequence of at most `max_length` tokens, special ones included, in the model's inputs."""

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=max_length)

    encode({"text": [""]})  # leaves the truncation set: older `datasets` hash it with the tokenizer, for their cache
    return texts.map(encode, batched=True, remove_columns=["text"], desc="tokenising")


def open_source(source: str, config: str | None, *, streaming: bool = False) -> Any:
    """The rows of a source: a `datasets.Dataset`, or with `streaming` an `IterableDataset`. Errors as `load_texts`."""
    path = Path(source)
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"cannot read {source!r}: its suffix {path.suffix!r} is none of {', '.join(BUILDERS)}")
        if not path.stat().st_size:
            raise ValueError(f"{source!r} holds no text: the file is empty")
        return load_files(source, [path], streaming=streaming)
    if path.is_dir():
        kinds = _kinds_in(path)
        if len(kinds) != 1:
            found = " and ".join(kinds) if kinds else "none"
            raise ValueError(
                f"the folder {source!r} must hold one kind of {', '.join(BUILDERS)} files; it holds {found}"
            )
        return load_files(source, training_files(path, kinds[0]), streaming=streaming)
    if path.suffix in BUILDERS or path.is_absolute() or source.startswith("."):
        raise ValueError(f"there is no file or folder {source!r}")
    return load_train_split(source, source, name=config, streaming=streaming)


def training_files(folder: Path, suffix: str) -> list[Path]:
    """The files of a kind in a folder and below it that are trained on, as `load_texts` has it.

    Raises:
        ValueError: all are named by their split, and none is of training.
    """
    files = _visible(folder, suffix)
    splits = {path: split for path in files if (split := _split_of(path.relative_to(folder)))}
    if len(splits) < len(files):
        return files
    chosen = [path for path, split in splits.items() if split.startswith("train")]
    if not chosen:
        names = ", ".join(sorted(set(splits.values())))
        raise ValueError(f"the files of {str(folder)!r} are named as {names}, none as train")
    return chosen


def load_files(source: str, files: Sequence[Path], **options: Any) -> Any:
    """The rows of files of one kind; errors as `load_train_split`."""
    names = [glob.escape(str(path)) for path in files]  # datasets takes names for patterns
    return load_train_split(source, BUILDERS[files[0].suffix], data_files=names, **options)


def fingerprint_source(source: str, config: str | None) -> str:
    """What stands at a source, by its content; of a data set on the hub its revision. Errors as `load_texts`."""
    path = Path(source)
    if path.is_file():
        return fingerprint_files([path])
    if path.is_dir():
        kinds = _kinds_in(path)
        # Of images all that is there.
        return fingerprint_files(training_files(path, kinds[0]) if len(kinds) == 1 else _visible(path, ""))
    return str(datasets.load_dataset_builder(source, name=config).hash)


def is_plain_text(source: str) -> bool:
    """Whether the source is a .txt file or a folder of them, which have the one column "text"."""
    path = Path(source)
    return path.suffix == ".txt" or (path.is_dir() and _kinds_in(path) == [".txt"])


def _kinds_in(folder: Path) -> list[str]:
    return [suffix for suffix in sorted(BUILDERS) if _visible(folder, suffix)]


def _visible(folder: Path, suffix: str) -> list[Path]:
    """Files of a kind in a folder and below it, but for hidden ones."""
    files = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _split_of(path: Path) -> str | None:
    """What split a file's name, or that of a folder it is in, tells; None where none does."""
    for name in (*path.parts[:-1], path.stem):
        if match := _SPLIT.fullmatch(name):
            return match[1]
    return None


def load_train_split(source: str, builder: str, **options: Any) -> Any:
    """`datasets.load_dataset` with its many errors as one `ValueError` sentence about the source."""
    try:
        return datasets.load_dataset(builder, split="train", **options)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # A name, configuration or split that does not exist, no network, an empty or broken file (then the cause says).
        reason = " ".join(str(error.__cause__ or error).split())
        here = "" if Path(source).exists() else ", which is no file or folder here, from the hub"
        raise ValueError(f"cannot load the data {source!r}{here}: {reason}") from error


def _text_of(source: str, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    if is_plain_text(source):
        column = "text"
    if column not in rows.column_names:
        raise ValueError(f"{source!r} has no column {column!r}; choose with --text_column from {rows.column_names}")
    feature = rows.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"the column {column!r} of {source!r} holds {feature}, not text; its columns: {rows.column_names}"
        )
    texts = rows.select_columns([column]).rename_columns({column: "text"}).cast_column("text", datasets.Value("string"))
    texts = texts.filter(lambda batch: [bool(text and text.strip()) for text in batch["text"]], batched=True)
    if not len(texts):
        raise ValueError(f"{source!r} holds no text: all {len(rows)} rows of its column {column!r} are empty")
    return texts
