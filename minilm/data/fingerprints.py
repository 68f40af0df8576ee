"""What data are, told by their content: the same wherever they lie and whenever they were written.

All that is read of small data is hashed. Of large data the sizes and evenly spaced blocks of each file are, so that a
start reads HASHED_BYTES at most: a change that keeps a file's size and lies between two blocks goes unseen.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

HASHED_BYTES = 2**28  # of all files together, a fraction of a second
MAX_FILES = 10_000  # that are opened; of more (folders of images) all sizes count and every n-th content
BLOCKS = 16  # of a file that is not hashed whole
MIN_BLOCK = 4096


def fingerprint_files(files: Sequence[Path]) -> str:
    """A hex digest of the files' contents in their order; names and times do not count.

    Raises:
        OSError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    every = -(-len(files) // MAX_FILES)
    share = HASHED_BYTES // min(MAX_FILES, max(1, len(files)))
    for index, path in enumerate(files):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        if index % every == 0:
            with path.open("rb") as file:
                for start, length in _blocks(size, share):
                    file.seek(start)
                    digest.update(file.read(length))
    return digest.hexdigest()


def fingerprint_texts(texts: Iterable[str]) -> str:
    """A hex digest of texts in their order; a hub revision is one too."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def _blocks(size: int, share: int) -> list[tuple[int, int]]:
    """(start, length) of what is hashed of a file: all of it, or blocks of which the last ends it."""
    if size <= share:
        return [(0, size)]
    length = max(MIN_BLOCK, share // BLOCKS)
    return [(number * (size - length) // (BLOCKS - 1), length) for number in range(BLOCKS)]
