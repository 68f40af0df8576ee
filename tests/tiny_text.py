"""Text for tests without a network: a letter-by-letter tokenizer, a tiny teacher's folder and a file of lines."""

import random
import string
from pathlib import Path
from typing import Any

from tiny_models import tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece of single letters: 57 tokens, fewer than the tiny models embed."""
    pieces = SPECIAL + list(string.ascii_lowercase) + ["##" + letter for letter in string.ascii_lowercase]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    one, two = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_teacher(folder: Path, family: str = "bert", **config: Any) -> Path:
    """A tiny random model (32 wide, 4 heads, 4 layers) with its tokenizer, as a folder that the Auto classes load."""
    tiny_model(family, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def lines(count: int, seed: int = 0) -> list[str]:
    """Distinct lines of one to eight made-up words."""
    letters = random.Random(seed)

    def word() -> str:
        return "".join(letters.choices(string.ascii_lowercase, k=letters.randint(1, 5)))

    return [f"{' '.join(word() for _ in range(letters.randint(1, 7)))} {index:b}" for index in range(count)]


def write_lines(path: Path, count: int = 40) -> Path:
    path.write_text("\n".join(lines(count)) + "\n", encoding="utf-8")
    return path
