"""A question and its context as windows: token sequences that a model reads, of which each holds a part of the context.

The windows of a context overlap by a third of the length (128 of 384 tokens), so that an answer that the edge of one
cuts stands whole in the next. The question is the first text and is whole in each; of one longer than 64 tokens, or a
third of the length where that is less, the first ones are read.
"""

from bisect import bisect_left, bisect_right
from typing import Any

from datasets import Dataset, concatenate_datasets
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase

from minilm.errors import UsageError

LONGEST_QUESTION = 64  # tokens, as BERT's
AT_ONCE = 1000  # questions


def training_windows(records: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The windows of the records with `start_positions` and `end_positions` of the first gold answer.

    Both are the null token where the question has no answer, or the window does not hold all of it. That is the
    tokenizer's CLS token; where it puts none, the first token.

    Args:
        records: "question", "context" and "answers", as `minilm.evaluation.answer_records` has them.
        max_length: tokens of a window, the question and special tokens among them.

    Raises:
        UsageError: a tokenizer that does not tell where its tokens stand in the text; too short a `max_length`.
    """

    def positions(answers: dict[str, Any], offsets: list[tuple[int, int]], first: int, null: int) -> dict[str, int]:
        start, end = _span(answers, offsets)
        is_there = start <= end
        return {
            "start_positions": first + start if is_there else null,
            "end_positions": first + end if is_there else null,
        }

    return _windows(records, tokenizer, max_length, positions)


def evaluation_windows(records: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The windows of the records with what leads back from tokens to text; arguments and errors as `training_windows`.

    Its columns beside the model's inputs: "record", its row in `records`; "null", the place of the null token; "first",
    the place of the first token of context; "begins" and "ends", of each token of context in characters.
    """

    def places(answers: dict[str, Any], offsets: list[tuple[int, int]], first: int, null: int) -> dict[str, Any]:
        begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
        return {"null": null, "first": first, "begins": begins, "ends": ends}

    return _windows(records, tokenizer, max_length, places)


def _windows(records: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, describe: Any) -> Dataset:
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer is a {type(tokenizer).__name__}, which does not tell where in a text its tokens stand: "
            "answers need one that is backed by the tokenizers library"
        )
    third, special = max_length // 3, tokenizer.num_special_tokens_to_add(pair=True)
    if max_length - 2 * third <= special:
        raise UsageError(
            f"max_length {max_length} leaves no room for question and context beside the tokenizer's {special} special "
            "tokens"
        )

    def cut(start: int) -> Dataset:
        batch = records[start : start + AT_ONCE]
        encoded = tokenizer(
            _first_tokens(tokenizer, batch["question"], min(LONGEST_QUESTION, third)),
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=third,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        described = []
        for window, sample in enumerate(encoded["overflow_to_sample_mapping"]):
            ids, text = encoded["input_ids"][window], encoded.sequence_ids(window)
            first = text.index(1) if 1 in text else len(text)
            offsets = encoded["offset_mapping"][window][first : first + text.count(1)]
            null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            described.append({"record": start + sample, **describe(batch["answers"][sample], offsets, first, null)})
        inputs = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        return Dataset.from_dict(inputs | {name: [each[name] for each in described] for name in described[0]})

    starts = tqdm(range(0, len(records), AT_ONCE), desc="cutting contexts", unit="k questions", leave=False)
    return concatenate_datasets([cut(start) for start in starts])


def _first_tokens(tokenizer: PreTrainedTokenizerBase, questions: list[str], count: int) -> list[str]:
    """Of each question, the text of its first tokens."""
    questions = [question.strip() for question in questions]
    encoded = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=count, return_offsets_mapping=True
    )
    return [
        question[: offsets[-1][1]] if len(offsets) == count else question
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _span(answers: dict[str, Any], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """The first and last token of the first gold answer among tokens at `offsets`; (0, -1) where it is not whole."""
    nowhere = 0, -1
    if not answers["text"] or not offsets:
        return nowhere
    text = answers["text"][0]
    begin = answers["answer_start"][0] + len(text) - len(text.lstrip())
    end = begin + len(text.strip())
    if begin < offsets[0][0] or end > offsets[-1][1]:
        return nowhere
    return bisect_right(offsets, begin, key=lambda of: of[1]), bisect_left(offsets, end, key=lambda of: of[0]) - 1
