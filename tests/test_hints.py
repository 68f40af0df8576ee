"""What a run is told before it starts: by the sizes and the start of its student, and what it trains."""

from typing import Any

import pytest

from minilm.cli.hints import hints

ASSISTANT = (
    "at most half the teacher's layers and width: an assistant may help, --assistant_num_layers 12 "
    "--assistant_hidden_size 384 (MiniLM, section 3.4)"
)
END = (
    "relations leave what lies above them as it starts: for sentence vectors that serve without fine-tuning, "
    "--embedding_weight 1{} (EXPERIMENTS.md)"
)


def metrics(layers: int = 12, hidden_size: int = 768, start: str = "auto", **others: Any) -> dict[str, Any]:
    """Of a student of a teacher of 12 layers x 768; what it trains does not reach its end."""
    return {
        "teacher": {"layers": 12, "hidden_size": 768},
        "student": {"layers": layers, "hidden_size": hidden_size},
        "arguments": {"student": None, "student_init": start},
        "in_chain": False,
        "serves": False,
        "learns_hidden": False,
        "processor": "tokenizer",
        **others,
    }


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (metrics(6), [END.format("")]),
        (metrics(12, 384), [END.format(" --student_init pca")]),
        (metrics(12, 384, "pca"), [END.format("")]),
        (metrics(12, 384, arguments={"student": "folder", "student_init": "auto"}), [END.format("")]),
        (metrics(6, 384), [ASSISTANT, END.format(" --student_init pca")]),
        (metrics(6, 384, in_chain=True), []),
        (metrics(7, 384, serves=True), []),
        (metrics(6, 385, learns_hidden=True), []),
        (metrics(6, 384, processor="image processor"), [ASSISTANT]),
    ],
)
def test_hints(told: dict[str, Any], expected: list[str]) -> None:
    assert hints(told) == expected
