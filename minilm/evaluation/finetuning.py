"""Fine-tuning on a task and scoring: classes and numbers of texts and pairs, classes of words."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from minilm.errors import UsageError
from minilm.evaluation.answer_training import finetune_answers
from minilm.evaluation.fitting import fit, predict
from minilm.evaluation.metrics import scores
from minilm.evaluation.settings import Settings
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.task_models import load_for_task
from minilm.evaluation.tasks import Scores

IGNORED = -100  # by the loss, as a label
OUTSIDE = "O"  # the tag of a word in no entity


def finetune(model: str, data: TaskData, settings: Settings, folder: Path) -> Scores:
    """What the model scores after it was fine-tuned with a new head, with the weights of the last step.

    A text is classified, or its number predicted, by the head that transformers has for the model. A word is classified
    by its first token. How answers are found is said at `finetune_answers`.

    Args:
        folder: for the Trainer, which leaves nothing in it.

    Raises:
        UsageError: nothing to train on; a model that does not load or has no such head.
        NonFiniteError: the loss or the weights became NaN or infinite.
    """
    if not len(data.train):
        raise UsageError(f"the task {data.task.name!r} has no training split: nothing to fine-tune on")
    data = replace(data, train=_subsample(data, settings.max_train_records, settings.seed))
    judge = {"tokens": _of_words, "answers": finetune_answers}.get(data.task.form, _of_texts)
    return judge(model, data, settings, folder)


def _of_texts(model: str, data: TaskData, settings: Settings, folder: Path) -> Scores:
    numbers, length = data.task.form == "regression", settings.length(data.task.form)
    network, tokenizer = load_for_task(
        model,
        AutoModelForSequenceClassification,
        length,
        settings.seed,
        num_labels=1 if numbers else len(data.classes),
        problem_type="regression" if numbers else "single_label_classification",
    )

    def encode(split: Dataset) -> Dataset:
        columns = [split[text][:] for text in data.task.texts]
        labels = [float(label) for label in split[data.task.label]] if numbers else split[data.task.label][:]
        encoded = tokenizer(*columns, truncation=True, max_length=length)
        return Dataset.from_dict({**encoded, "labels": labels})

    collate = DataCollatorWithPadding(tokenizer)
    name = f"{Path(model).name} on {data.task.name}"
    trainer = fit(network, encode(data.train), collate, settings, folder, name, keep=_first)
    found = {}
    for split, records in data.evaluated.items():
        logits = predict(trainer, encode(records))
        predictions = logits[:, 0] if numbers else logits.argmax(-1)
        found[split] = scores(data.task.metrics, predictions, np.array(records[data.task.label]))
    return found


def _of_words(model: str, data: TaskData, settings: Settings, folder: Path) -> Scores:
    length = settings.length(data.task.form)
    network, tokenizer = load_for_task(
        model, AutoModelForTokenClassification, length, settings.seed, num_labels=len(data.classes)
    )
    if not tokenizer.is_fast:
        raise UsageError(
            f"the {type(tokenizer).__name__} of {model!r} does not tell which characters a token stands for, and so "
            f"not which word, as {data.task.name!r} needs: save a tokenizer.json with the model"
        )

    def encode(split: Dataset) -> _Words:
        return _encode_words(tokenizer, split[data.task.texts[0]], split[data.task.label], length)

    collate = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
    trainer = fit(
        network,
        encode(data.train).records,
        collate,
        settings,
        folder,
        f"{Path(model).name} on {data.task.name}",
        keep=lambda logits: _first(logits).argmax(-1),
    )
    found = {}
    for split, records in data.evaluated.items():
        words = encode(records)
        classes = predict(trainer, words.records)
        predictions = [
            [OUTSIDE if token is None else data.classes[classes[text, token]] for token in tokens]
            for text, tokens in enumerate(words.first_tokens)
        ]
        labels = [[data.classes[label] for label in labels] for labels in records[data.task.label]]
        found[split] = scores(data.task.metrics, predictions, labels)
    return found


class _Words(NamedTuple):
    records: Dataset
    first_tokens: list[list[int | None]]  # of each text, of each word; None for one that was cut off or has no token


def _encode_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], labels: Sequence[list[int]], max_length: int
) -> _Words:
    """Texts of words, with a label at the first token of each word.

    The words are tokenized as one text with spaces between them: so a word's tokens are those that the model was
    trained on, whether its tokenizer takes the space to the word (as RoBERTa's) or not.
    """
    encoded = tokenizer(
        [" ".join(words) for words in texts], truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    first_tokens = [
        _first_tokens(words, spans) for words, spans in zip(texts, encoded.pop("offset_mapping"), strict=True)
    ]
    token_labels = [[IGNORED] * len(tokens) for tokens in encoded["input_ids"]]
    for of_tokens, firsts, of_words in zip(token_labels, first_tokens, labels, strict=True):
        for token, label in zip(firsts, of_words, strict=True):
            if token is not None:
                of_tokens[token] = label
    return _Words(Dataset.from_dict({**encoded, "labels": token_labels}), first_tokens)


def _first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """Of each word its first token, which reaches into no word before; spans are (start, end) in the text."""
    found: list[int | None] = []
    token, start = 0, 0
    for word in words:
        end = start + len(word)
        while token < len(spans) and spans[token][1] <= start:  # special tokens have the span (0, 0)
            token += 1
        inside = token < len(spans) and spans[token][0] < end
        found.append(token if inside else None)
        token += inside
        start = end + 1
    return found


def _first(logits: Any) -> Any:
    """The logits, without the hidden states and caches that some models return beside them."""
    return logits[0] if isinstance(logits, tuple) else logits


def _subsample(data: TaskData, count: int | None, seed: int) -> Dataset:
    """So many training records at most: drawn by the seed, with all classes and sizes of numbers in their shares."""
    records = data.train
    if count is None or count >= len(records):
        return records
    order = np.random.default_rng(seed).permutation(len(records))
    if data.task.form in ("classification", "regression"):
        labels = np.array(records[data.task.label])
        order = order[np.argsort(labels[order], kind="stable")]  # then every n-th is taken
    return records.select(np.sort(order[np.arange(count) * len(records) // count]))
