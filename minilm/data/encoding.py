"""Texts as the tokens that their sequences hold, reading no more of a long text than these.

A tokenizer reads all of a text and cuts its tokens then: a line of 50 MB takes it 20 s and 2.6 GB.
"""

from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

CHARACTERS_A_TOKEN = 16  # five are usual: a text is cut far behind the last token that counts


def encode(tokenizer: PreTrainedTokenizerBase, *texts: list[str], max_length: int, **options: Any) -> BatchEncoding:
    """What `tokenizer(*texts, truncation=True, max_length=max_length, **options)` gives.

    A text, if it is none of a pair, is cut at a space, and is read to its end only if all before is not too long.
    """

    def encoded(*columns: list[str]) -> BatchEncoding:
        result: BatchEncoding = tokenizer(*columns, truncation=True, max_length=max_length, **options)
        return result

    if len(texts) > 1 or not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return encoded(*texts)
    openings = [_opening(text, CHARACTERS_A_TOKEN * max_length) for text in texts[0]]
    result = encoded(openings)
    cut = [len(opening) < len(text) for opening, text in zip(openings, texts[0], strict=True)]
    enough = all(read.overflowing for read, was_cut in zip(result.encodings or (), cut, strict=True) if was_cut)
    return result if enough else encoded(*texts)


def _opening(text: str, size: int) -> str:
    end = text.rfind(" ", 0, size) if len(text) > size else -1
    return text if end < 0 else text[:end]
