"""A long text is read only as far as its sequence goes, and its tokens are those of the whole."""

import random
import string
from typing import Any

import pytest
from tiny_text import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minilm.data import encoding
from minilm.data.encoding import encode


def texts(count: int, seed: int) -> list[str]:
    """Of words and of what hides where a token ends: runs of spaces, lines, combining marks, no space at all."""
    draw = random.Random(seed)
    pieces = [" ", "  ", "\n", "\t", "'s", "e\u0301", "漢字", "🙂", "-", *string.ascii_lowercase]
    odds = [20, 2, 2, 1, 1, 1, 1, 1, 1, *[3] * 26]
    return ["".join(draw.choices(pieces, odds, k=draw.choice([0, 3, 40, 300]))) for _ in range(count)]


def trained(model: Any, trainer: Any, pre_tokenizer: Any, **more: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts(200, seed=9), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **more)


def byte_bpe(**more: Any) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), **more)


def unigram() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="[UNK]", show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


TOKENIZERS = {
    "word pieces": tiny_tokenizer,
    "byte pairs": byte_bpe,
    "unigram": unigram,
    "cut on the left": lambda: byte_bpe(truncation_side="left"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("characters", [1, 2, 6, 16])
def test_the_tokens_are_those_of_the_whole_text(kind: str, characters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHARACTERS_A_TOKEN", characters)
    tokenizer = TOKENIZERS[kind]()
    for text in texts(100, seed=characters):
        for max_length in (4, 16):
            whole = tokenizer([text, "a"], truncation=True, max_length=max_length)
            assert dict(encode(tokenizer, [text, "a"], max_length=max_length)) == dict(whole), repr(text)


def test_a_text_of_fifty_megabytes_is_hardly_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    read: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: Any, batch: list[str], **options: Any) -> Any:
        read.extend(map(len, batch))
        return call(self, batch, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    long = "some words " * 5_000_000
    rows = encode(tokenizer, [long, "a b"], max_length=16, padding=True, return_tensors="pt")
    assert rows["input_ids"].shape == (2, 16)
    assert sum(read) < 1000


def test_the_longer_of_a_pair_is_cut_as_ever() -> None:
    tokenizer = tiny_tokenizer()
    pair = ["a b c " * 400], ["d " * 300]
    assert dict(encode(tokenizer, *pair, max_length=12)) == dict(tokenizer(*pair, truncation=True, max_length=12))
