"""Pairs of texts: two columns of a table become one sequence."""

import csv
from pathlib import Path

import datasets
import pytest
from conftest import CommandLine
from tiny_text import lines, tiny_tokenizer

from minilm.data.texts import Texts, load_splits, without_copies
from minilm.data.vocabulary import count_tokens


def write_pairs(path: Path) -> list[tuple[str, str]]:
    """Twenty pairs of five first texts, and two that are blank on one side."""
    pairs = [(first, second) for first in lines(5) for second in lines(4, seed=1)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("premise", "hypothesis"), *pairs, ("a b", " "), ("", "a b")])
    return pairs


def test_a_pair_is_one_sequence_of_both_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pairs, tokenizer = write_pairs(tmp_path / "pairs.csv"), tiny_tokenizer()
    columns = {"text_column": "premise", "pair_column": "hypothesis"}
    train, heldout, copies = load_splits([str(tmp_path / "pairs.csv")], tokenizer, 24, **columns)
    assert (len(train), len(heldout), copies) == (19, 1, 0)  # another pair of the same first text is no copy
    expected = [tokenizer(*pair, truncation=True, max_length=24) for pair in pairs]
    assert any(len(row["input_ids"]) == 24 for row in expected)
    assert sorted([*train["input_ids"], *heldout["input_ids"]]) == sorted(row["input_ids"] for row in expected)


def test_a_copy_is_a_pair_that_is_held_out() -> None:
    train = datasets.Dataset.from_dict({"text": ["a", "a", "ab"], "pair": ["b", "c", ""]})
    heldout = datasets.Dataset.from_dict({"text": ["a"], "pair": ["b"]})
    assert without_copies(train, heldout)["pair"][:] == ["c", ""]


def test_where_there_are_no_pairs(
    tmp_path: Path, command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "pairs.csv")
    flags = ["--text_column", "premise", "--student_num_layers", "2", "--output_dir", "out", "--use_cpu"]

    def told(data: str, *more: str) -> str:
        code, _, err = command("--teacher", teacher, "--data", data, *flags, *more)
        assert (code, err.count("\n")) == (2, 1)
        return err

    assert "is plain text, which has no column 'pair'" in told(data, "--text_pair_column", "pair")
    pairs = str(tmp_path / "pairs.csv")
    wanted = "has no column 'pair'; choose with --text_pair_column from ['premise', 'hypothesis']"
    assert wanted in told(pairs, "--text_pair_column", "pair")
    hub = datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    assert wanted in told("on/the-hub", "--text_pair_column", "pair")
    room = ["--max_length", "3", "--text_pair_column", "hypothesis"]
    assert "max_length 3 leaves no room beside the tokenizer's 3 special tokens of a pair" in told(pairs, *room)
    stream = ["--streaming", "--max_steps", "2", "--text_pair_column", "hypothesis"]
    assert "--text_pair_column hypothesis is not read from a stream" in told(pairs, *stream)
    assert "--text_pair_column hypothesis does not go with --packing" in told(
        pairs, "--packing", "--text_pair_column", "hypothesis"
    )


def test_a_smaller_vocabulary_has_the_tokens_of_both_texts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = Texts(
        [datasets.Dataset.from_dict({"text": ["a", "a"], "pair": ["b", "c"]})], datasets.Dataset.from_dict({})
    )
    counts = count_tokens(texts, tokenizer, 24)
    assert [counts[tokenizer.convert_tokens_to_ids(letter)] for letter in "abcd"] == [1.0, 0.5, 0.5, 0.0]
