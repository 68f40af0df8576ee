"""Questions that a tiny random model learns to answer in seconds, and its folder: who lives where since when."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

FACTS = {
    "Who ?": ["Anna", "Ben", "Clara", "David", "Emma", "Frank"],
    "Where ?": ["Paris", "London", "Rome", "Berlin", "New York", "Los Angeles"],
    "When ?": ["1984", "1991", "1999", "2003", "2010", "2017"],
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, *" ".join(["lives in since", *FACTS, *(text for each in FACTS.values() for text in each)]).split()]


def tiny_answers(count: int, seed: int, unanswerable: float = 0.0) -> Dataset:
    """Records of one sentence, of which a share lacks what is asked for."""
    drawn = random.Random(seed)
    records: list[dict[str, Any]] = []
    for _ in range(count):
        facts = {question: drawn.choice(answers) for question, answers in FACTS.items()}
        question = drawn.choice(list(facts))
        text = [facts[question]]
        if drawn.random() < unanswerable:
            facts[question], text = "", []
        person, city, year = facts.values()
        context = f"{person} lives in {city} since {year}"
        answers = {"text": text, "answer_start": [context.index(answer) for answer in text]}
        records.append({"question": question, "context": context, "answers": answers})
    return Dataset.from_list(records)


def save_reader(folder: Path, **config: Any) -> Path:
    """A tiny random BERT of two layers without dropout, with a tokenizer of these words."""
    words = dict.fromkeys(WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    settings = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config}
    tiny_model("bert", **settings).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder
