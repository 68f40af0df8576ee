"""Text from files, folders or the hub, as tokenised sequences and a held-out part.

A row of the text column is one text: a line of a .txt file, a record of a .jsonl or .parquet file. Blank texts are
dropped; a text longer than `max_length` tokens is truncated. Nothing is packed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
HELDOUT_SHARE, HELDOUT_MAX = 0.05, 512  # enough for a mean to two digits, little enough to evaluate often


def load_texts(sources: Sequence[str], *, config: str | None = None, text_column: str = "text") -> datasets.Dataset:
    """All texts of the sources, in their order, as a data set with the one column "text".

    Args:
        sources: each a .txt, .jsonl or .parquet file, a folder of one kind of them, or a data set's name on the hub. Of
            a folder or hub name whose files are named by split (train, test, ...) the train split is read.
        config: the configuration of a hub name ("wikitext-2-raw-v1").
        text_column: where the text stands; a .txt file needs none.

    Raises:
        ValueError: nothing there, another kind of file, no such column, or no text in it.
    """
    parts = [_text_of(source, _rows(source, config), text_column) for source in sources]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def split_heldout(texts: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training, held-out): one text in twenty, at most 512, drawn the same way in every run whatever its seed.

    Raises:
        ValueError: fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"the data hold {len(texts)} text; at least 2 are needed, one to train on and one held out")
    size = min(HELDOUT_MAX, max(1, int(HELDOUT_SHARE * len(texts))))
    halves = texts.train_test_split(test_size=size, seed=0)
    return halves["train"], halves["test"]


def tokenize(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Each text as one sequence of at most `max_length` tokens, special ones included, in the model's inputs."""

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=max_length)

    return texts.map(encode, batched=True, remove_columns=["text"], desc="tokenising")


def _rows(source: str, config: str | None) -> datasets.Dataset:
    path = Path(source)
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"cannot read {source!r}: its suffix {path.suffix!r} is none of {', '.join(BUILDERS)}")
        if not path.stat().st_size:
            raise ValueError(f"{source!r} holds no text: the file is empty")
        return _train_split(source, BUILDERS[path.suffix], data_files=source)
    if path.is_dir():
        kinds = sorted({file.suffix for file in path.rglob("*") if file.suffix in BUILDERS})
        if len(kinds) != 1:
            found = " and ".join(kinds) if kinds else "none"
            raise ValueError(
                f"the folder {source!r} must hold one kind of {', '.join(BUILDERS)} files; it holds {found}"
            )
        return _train_split(source, source)
    if path.suffix in BUILDERS or path.is_absolute() or source.startswith("."):
        raise ValueError(f"there is no file or folder {source!r}")
    return _train_split(source, source, name=config)


def _train_split(source: str, builder: str, **options: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(builder, split="train", **options)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # A name, configuration or split that does not exist, no network, an empty or broken file (then the cause says).
        reason = " ".join(str(error.__cause__ or error).split())
        here = "" if Path(source).exists() else ", which is no file or folder here, from the hub"
        raise ValueError(f"cannot load the data {source!r}{here}: {reason}") from error


def _text_of(source: str, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    if Path(source).suffix == ".txt":
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
