"""Sentence vectors of a frozen model, through sentence-transformers."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from minilm.models.teachers import loading, quiet

BATCH_SIZE = 64


class Encoder:
    """A folder or name as sentence-transformers loads it; without its files, means over the tokens.

    The vectors are those before a normalisation, which cosines do not need and which would hide a vector's length from
    a classifier.

    Args:
        max_length: tokens of a text, special ones among them; fewer where the model's files say so.

    Attributes:
        loaded: what sentence-transformers has loaded, with its normalisation.
    """

    def __init__(self, name: str, max_length: int) -> None:
        with loading("model", name), quiet(), _without_hints():
            self.loaded = loaded = SentenceTransformer(name, trust_remote_code=False)
            modules = [module for module in loaded if type(module).__name__ != "Normalize"]
            self._model = SentenceTransformer(modules=modules, device=str(loaded.device))
            self._model.prompts, self._model.default_prompt_name = loaded.prompts, loaded.default_prompt_name
            self._model.max_seq_length = min(max_length, loaded.max_seq_length or max_length)
            if self._model.tokenizer.pad_token is None:
                self._model.tokenizer.pad_token = self._model.tokenizer.eos_token
            self.encode(["a"])  # a trial: some faults of a folder's files show only then

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, E)."""
        vectors = self._model.encode(list(texts), batch_size=BATCH_SIZE, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


@contextmanager
def _without_hints() -> Iterator[None]:
    """Without sentence-transformers' line on how it pools a model that has none of its files."""
    logger = logging.getLogger("sentence_transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
