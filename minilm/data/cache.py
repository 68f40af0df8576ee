"""What `datasets` loads, and the cache in which it keeps what was read and tokenised once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from minilm.errors import UsageError


def fingerprint_hub(name: str, config: str | None) -> str:
    """The revision of a data set on the hub."""
    return str(datasets.load_dataset_builder(name, name=config).hash)


@contextmanager
def cache_faults() -> Iterator[None]:
    """Around what writes to the cache of `datasets`, and reads nothing but it."""
    try:
        yield
    except OSError as error:
        raise cache_error(error) from error


def cache_error(error: OSError) -> OSError:
    return OSError(
        f"cannot write to the cache folder {datasets.config.HF_DATASETS_CACHE} ({error.strerror or error}): set "
        "HF_DATASETS_CACHE or HF_HOME to another"
    )


def load_train_split(source: str, builder: str, **options: Any) -> Any:
    """`datasets.load_dataset` with its many errors as one `ValueError` sentence about the source."""
    try:
        return datasets.load_dataset(builder, split="train", **options)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # A name, configuration or split that does not exist, no network, an empty or broken file (then the cause says).
        cause = error.__cause__ or error
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        if isinstance(cause, OSError) and cause.filename and Path(cause.filename).is_relative_to(cache):
            raise cache_error(cause) from error
        reason = " ".join(str(cause).split())
        here = "" if Path(source).exists() else ", which is no file or folder here, from the hub"
        raise UsageError(f"cannot load the data {source!r}{here}: {reason}") from error
