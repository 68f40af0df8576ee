"""Questions with the places of their answers, as they are read and checked: of the hub, or of SQuAD's own files."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from minilm.data.faults import DataError


def questions_of(records: Dataset, where: str) -> Dataset:
    """The records themselves, or the questions in them where they are articles of paragraphs, as in SQuAD's files.

    Raises:
        DataError: articles without what SQuAD's have.
    """
    if "paragraphs" not in records.column_names:
        return records
    try:
        return Dataset.from_list(list(_within(records)))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} has the column 'paragraphs', in which something else stands than SQuAD's files have: {error}"
        ) from error


def check_answers(records: Dataset, where: str) -> None:
    """Raises `DataError` for answers that do not stand in their context where they should.

    Args:
        records: with "context", and "answers" as {"text": [...], "answer_start": [...]}, the starts in characters; both
            are empty for a question without an answer.
    """
    columns = records["context"], records["answers"]
    for row, (context, answers) in enumerate(zip(*columns, strict=True), 1):
        if not _are_answers(answers):
            raise DataError(
                f"record {row} of {where} has the answers {answers!r}, which are not as "
                "{'text': ['Rome'], 'answer_start': [17]}"
            )
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            there = context[start : start + len(text)] if start >= 0 else ""
            if there != text:
                raise DataError(
                    f"record {row} of {where} has the answer {text!r} at character {start} of its context, where "
                    f"{there!r} stands"
                )


def _are_answers(answers: Any) -> bool:
    if not isinstance(answers, dict):
        return False
    texts, starts = answers.get("text"), answers.get("answer_start")
    return (
        isinstance(texts, list)
        and isinstance(starts, list)
        and len(texts) == len(starts)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(start, int) for start in starts)
    )


def _within(articles: Dataset) -> Iterator[dict[str, Any]]:
    for paragraphs in articles["paragraphs"]:
        for paragraph in paragraphs:
            for question in paragraph["qas"]:
                answers = question["answers"]
                yield {
                    "question": question["question"],
                    "context": paragraph["context"],
                    "answers": {name: [answer[name] for answer in answers] for name in ("text", "answer_start")},
                }
