"""Questions and answers are read from the hub's columns and SQuAD's own files; faults are one sentence."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import write_split

from minilm.errors import UsageError
from minilm.evaluation.task_data import read_task
from minilm.evaluation.tasks import TASKS

TASK = TASKS["squad_v2"]
CONTEXT = "Anna lives in Rome."
RECORDS: list[dict[str, Any]] = [
    {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Rome", "in Rome"], "answer_start": [14, 11]}},
    {"question": "When?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]
ARTICLES = {
    "version": "v2.0",
    "data": [
        {
            "title": "Anna",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "question": "Where?",
                            "id": "0",
                            "answers": [{"text": "Rome", "answer_start": 14}, {"text": "in Rome", "answer_start": 11}],
                            "is_impossible": False,
                        },
                        {
                            "question": "When?",
                            "id": "1",
                            "answers": [],
                            "is_impossible": True,
                            "plausible_answers": [{"text": "Rome", "answer_start": 14}],
                        },
                    ],
                }
            ],
        }
    ],
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_columns_as_the_hub_has_them(kind: str, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_split(tmp_path / "squad_v2", f"{split}.{kind}", [{"id": "0", "title": "x", **each} for each in RECORDS])
    data = read_task(TASK, tmp_path)
    assert data.train.to_list() == data.evaluated["validation"].to_list() == RECORDS
    assert data.classes == ()


def test_squads_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "squad_v2"
    folder.mkdir()
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        (folder / name).write_text(json.dumps(ARTICLES), encoding="utf-8")
    data = read_task(TASK, tmp_path)
    assert data.train.to_list() == data.evaluated["validation"].to_list() == RECORDS


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (
            {"text": ["Rome"], "answer_start": [13]},
            "has the answer 'Rome' at character 13 of its context, where ' Rom'",
        ),
        ({"text": ["Rome"], "answer_start": [-5]}, "has the answer 'Rome' at character -5 of its context, where ''"),
        ({"text": ["Rome"], "answer_start": [99]}, "has the answer 'Rome' at character 99 of its context, where ''"),
        ({"text": ["Rome"], "answer_start": []}, "which are not as {'text': ['Rome'], 'answer_start': [17]}"),
        ({"text": [1], "answer_start": [1]}, "has the answers {'text': [1], 'answer_start': [1]}, which are not as"),
        ({"text": ["Rome"], "answer_start": ["14"]}, "which are not as"),
        ("Rome", "has the answers 'Rome', which are not as"),
    ],
)
def test_answers_that_are_not_there_are_told(answers: Any, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "squad_v2"
    write_split(folder, "train.jsonl", RECORDS)
    write_split(folder, "validation.jsonl", [{**RECORDS[0], "answers": answers}])
    where = f"record 1 of the split 'validation' of {str(folder)!r} "
    with pytest.raises(UsageError, match=f"^{re.escape(where)}.*{re.escape(sentence)}"):
        read_task(TASK, tmp_path)


def test_articles_of_another_kind_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "squad_v2"
    for split in ("train", "validation"):
        write_split(folder, f"{split}.jsonl", [{"title": "x", "paragraphs": [{"text": "x"}]}] * 2)
    with pytest.raises(UsageError, match=r"has the column 'paragraphs', in which something else .*: 'qas'"):
        read_task(TASK, tmp_path)
