"""What `datasets` loads, and the cache in which it keeps what was read and tokenised once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from minilm.errors import UsageError


def fingerprint_hub(name: str, config: str | None) -> str:
    """The revision of a data set on the hub."""
    return str(datasets.load_dataset_builder(name, name=config).hash)


class CacheError(OSError):
    """The cache of `datasets` cannot be written, or holds a damaged file: one sentence with its folder."""


@contextmanager
def cache_faults() -> Iterator[None]:
    """Around what writes to the cache of `datasets`, and reads nothing but it."""
    try:
        yield
    except CacheError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise cache_error(error) from error


def cache_error(error: OSError | pa.ArrowException) -> CacheError:
    folder = datasets.config.HF_DATASETS_CACHE
    if isinstance(error, OSError) and error.errno is not None:
        what = f"cannot write to the cache folder {folder} ({error.strerror})"
    else:  # of Arrow, which has no number
        what = f"a file in the cache folder {folder} is damaged ({' '.join(str(error).split())})"
        return CacheError(f"{what}: remove the folder, or set HF_DATASETS_CACHE or HF_HOME to another")
    return CacheError(f"{what}: set HF_DATASETS_CACHE or HF_HOME to another")


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
