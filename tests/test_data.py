"""Reading text: every kind of source, blank texts, the held-out part, tokenising, mixing by weights, each error."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from tiny_text import tiny_tokenizer

from minilm.data.texts import (
    find_files,
    fingerprint_source,
    load_splits,
    load_texts,
    mixing_shares,
    split_heldout,
    tokenize,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else a name takes 20 s to fail


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*sources: Path | str, **options: Any) -> list[str]:
    texts = load_texts([str(source) for source in sources], **options)
    assert texts.column_names == ["text"]
    return list(texts["text"])


def test_a_line_of_a_txt_file_is_a_text_and_blank_ones_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\n   \ntwo words\nthree", encoding="utf-8")
    assert read(file) == ["one", "two words", "three"]


def test_jsonl_and_parquet_give_their_text_column(tmp_path: Path) -> None:
    rows = [{"id": 1, "body": "one"}, {"id": 2, "body": None}, {"id": 3, "body": "two"}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(parquet))
    assert read(jsonl, text_column="body") == read(parquet, text_column="body") == ["one", "two"]


def test_a_folder_is_read_whole_and_other_files_in_it_are_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n", encoding="utf-8")
    (folder / "b.txt").write_text("two\n", encoding="utf-8")
    (folder / "README.md").write_text("not a text\n", encoding="utf-8")
    assert sorted(read(folder)) == ["one", "two"]


def test_of_a_folder_named_by_split_only_train_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"text": split}])
    assert read(folder) == ["train"]


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_no_file_of_a_folder_is_left_out_for_a_word_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write_lines(folder / "chapter1.txt", "one")
    write_lines(folder / "training_methods.txt", "two")
    write_lines(folder / "test_methods_of_the_latest_contest.txt", "three")
    assert sorted(read(folder)) == ["one", "three", "two"]


def test_splits_are_told_by_names_of_files_and_folders(tmp_path: Path) -> None:
    write_lines(tmp_path / "a" / "train" / "x.txt", "one")
    write_lines(tmp_path / "a" / "train-00001-of-00002.txt", "two")
    write_lines(tmp_path / "a" / "val" / "x.txt", "three")
    assert sorted(read(tmp_path / "a")) == ["one", "two"]
    write_lines(tmp_path / "b" / "test.txt", "four")
    write_lines(tmp_path / "b" / "dev" / "x.txt", "five")
    with pytest.raises(ValueError, match=r"the files of '.*b' are named as dev, test, none as train"):
        read(tmp_path / "b")


def test_other_and_hidden_files_of_a_folder_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write_lines(folder / "a[1].txt", "one")
    write_lines(folder / ".ipynb_checkpoints" / "a.jsonl", "{}")
    write_lines(folder / "README.md", "---", "configs: [{config_name: default, data_files: '*.csv'}]", "---")
    write_lines(folder / "script.py", "not a text")
    assert read(folder) == read(folder / "a[1].txt") == ["one"]
    assert read(folder, text_column="sentence") == ["one"]  # which a folder of .txt files needs none of


def test_several_sources_follow_each_other(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text("one\n", encoding="utf-8")
    rows = write_jsonl(tmp_path / "b.jsonl", [{"body": "two"}])
    assert read(lines, rows, text_column="body") == ["one", "two"]


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    def fails(match: str, *sources: Path | str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            read(*sources, **options)

    rows = write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "id": 1}])
    fails(r"has no column 'text'; choose with --text_column from \['body', 'id'\]", rows)
    fails(r"the column 'id' holds 1, not text, in row 1 of '.*a\.jsonl'", rows, text_column="id")
    fails(r"there is no file or folder '.*missing\.txt'", tmp_path / "missing.txt")
    fails(r"there is no file or folder '\./missing'", "./missing")
    fails("cannot load the data 'no/such-name', which is no file or folder here, from the hub", "no/such-name")

    (tmp_path / "empty.txt").touch()
    fails("'.*empty.txt' holds no text: the file is empty", tmp_path / "empty.txt")
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    fails("'.*blank.txt' holds no text: all 2 rows of its column 'text' are empty", tmp_path / "blank.txt")
    (tmp_path / "a.pdf").write_text("a,b\n", encoding="utf-8")
    fails(r"its suffix '\.pdf' is none of \.txt, .*\.csv, .*\.parquet", tmp_path / "a.pdf")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"', encoding="utf-8")
    fails(r"cannot read '.*broken.jsonl' at row 1: no JSON \(Expecting ',' delimiter", tmp_path / "broken.jsonl")

    fails(r"must hold one kind .*; it holds a\.jsonl, blank\.txt: name those to read", tmp_path)
    (tmp_path / "nothing").mkdir()
    fails(r"'.*nothing' holds no data \(\.txt, .*\): it holds none", tmp_path / "nothing")
    write_lines(tmp_path / "documents" / "a.md", "no data")
    fails(r"holds no data .*: it holds nothing but a\.md", tmp_path / "documents")
    fails("the name of the data is empty", "")
    os.mkfifo(tmp_path / "pipe.txt")
    fails("pipe.txt' is neither a file nor a folder", tmp_path / "pipe.txt")
    fails(r"the file name '.*\\udcff.txt' is not UTF-8", write_lines(tmp_path / "\udcff.txt", "one"))


def test_the_heldout_part_is_the_same_in_every_run_and_apart_from_training() -> None:
    texts = datasets.Dataset.from_dict({"text": [f"text {index}" for index in range(100)]})
    train, heldout = split_heldout(texts)
    again = split_heldout(datasets.Dataset.from_dict({"text": list(texts["text"])}))[1]
    assert (len(train), len(heldout)) == (95, 5)
    assert list(heldout["text"]) == list(again["text"])
    assert set(train["text"]) | set(heldout["text"]) == set(texts["text"])


def test_the_heldout_part_has_bounds() -> None:
    many = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(20_000)]})
    assert len(split_heldout(many)[1]) == 512
    assert [len(part) for part in split_heldout(many.select(range(2)))] == [1, 1]
    with pytest.raises(ValueError, match="hold 1 text; at least 2 are needed"):
        split_heldout(many.select(range(1)))


def test_tokenize_truncates_and_leaves_only_the_inputs_of_a_model() -> None:
    tokenizer = tiny_tokenizer()
    texts = datasets.Dataset.from_dict({"text": ["ab", "a long one"]})
    rows = tokenize(texts, tokenizer, 6)
    assert set(rows.column_names) == {"input_ids", "attention_mask"}
    assert list(rows["input_ids"]) == [tokenizer("ab")["input_ids"], [*tokenizer("a lon")["input_ids"][:5], 3]]


def sized(folder: Path, *counts: int) -> list[str]:
    """A file of distinct lines for each count; all lines of file 0 begin with the letter a, and so on."""
    letters = str.maketrans("0123456789", "abcdefghij")  # the tokenizer has no digits
    files = [folder / f"{index}.txt" for index in range(len(counts))]
    for index, (file, count) in enumerate(zip(files, counts, strict=True)):
        file.write_text(
            "".join(f"{chr(97 + index)} {line}\n".translate(letters) for line in range(count)), encoding="utf-8"
        )
    return [str(file) for file in files]


def splits(sources: Sequence[str], **options: Any) -> tuple[list[str], list[str]]:
    tokenizer = tiny_tokenizer()
    train, heldout, _ = load_splits(sources, tokenizer, 64, **options)
    assert set(train.column_names) == set(heldout.column_names) == {"input_ids", "attention_mask"}
    return tokenizer.batch_decode(list(train["input_ids"])), tokenizer.batch_decode(list(heldout["input_ids"]))


def test_weights_give_the_share_of_each_source_until_all_were_seen_whole(tmp_path: Path) -> None:
    sources = sized(tmp_path, 300, 40)
    train, heldout = splits(sources, weights=[1, 3])
    of_source = [[text for text in train if text.startswith(f"[CLS] {letter}")] for letter in "ab"]
    assert len(of_source[0]) + len(of_source[1]) == len(train)
    assert len(of_source[1]) / len(train) == pytest.approx(0.75, abs=0.04)
    assert set(Counter(of_source[0]).values()) == {1}  # the last to be exhausted: nothing of it repeats
    assert len(of_source[0]) == 300 - 15
    assert len(set(of_source[1])) == 40 - 2 < len(of_source[1])
    assert sum(text.startswith("[CLS] a") for text in heldout) == 15
    assert sum(text.startswith("[CLS] b") for text in heldout) == 2
    assert not set(train) & set(heldout)
    middle = len(train) // 2  # mixed throughout
    assert sum(text.startswith("[CLS] b") for text in train[:middle]) / middle == pytest.approx(0.75, abs=0.06)


def test_a_large_heldout_part_is_shared_out_by_weight(tmp_path: Path) -> None:
    _, heldout = splits(sized(tmp_path, 9000, 9000), weights=[3.0, 1.0])
    assert len(heldout) == 384 + 128
    assert sum(text.startswith("[CLS] a") for text in heldout) == 384


def test_without_weights_the_sources_are_one(tmp_path: Path) -> None:
    train, heldout = splits(sized(tmp_path, 30, 1))
    assert len(set(train) | set(heldout)) == len(train) + len(heldout) == 31
    assert len(heldout) == 1


def test_a_second_run_reads_and_tokenises_nothing(tmp_path: Path) -> None:
    sources = sized(tmp_path, 60, 50)
    cache = Path(datasets.config.HF_DATASETS_CACHE)

    def run(**options: Any) -> set[tuple[Path, int]]:
        splits(sources, **options)
        return {(file, file.stat().st_mtime_ns) for file in cache.rglob("*.arrow")}

    assert len(run(weights=[1, 1])) < len(run())
    after = run()
    assert run(weights=[1, 1]) == run(weights=[2, 1]) == after
    Path(sources[1]).write_text("other\nlines\n", encoding="utf-8")
    assert run() > after


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    sources = sized(tmp_path, 20, 20)
    with pytest.raises(ValueError, match="there are 3 weights for 2 sources"):
        splits(sources, weights=[1, 2, 3])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"the weight of '.*1\.txt' must be a positive number, not {weight}"):
            splits(sources, weights=[1, weight])


def fingerprint(source: str) -> str:
    return fingerprint_source(source, find_files(source), None)


def test_a_sources_fingerprint_goes_with_its_content_alone(tmp_path: Path) -> None:
    here, there = (
        write_lines(tmp_path / "a" / "x.txt", "one", "two"),
        write_lines(tmp_path / "b" / "y.txt", "one", "two"),
    )
    assert fingerprint(str(here)) == fingerprint(str(there))
    assert fingerprint(str(here.parent)) == fingerprint(str(there))
    before = fingerprint(str(here))
    write_lines(here, "one", "too")
    assert fingerprint(str(here)) != before
    write_lines(there.parent / "z.txt", "three")
    assert fingerprint(str(there.parent)) != before


def test_a_tables_other_columns_and_empty_parts_do_not_count(tmp_path: Path) -> None:
    for kind, write in {"parquet": datasets.Dataset.to_parquet, "jsonl": datasets.Dataset.to_json}.items():
        (tmp_path / kind).mkdir()
        rows: list[dict[str, Any]] = [
            {"text": "one", "id": 1},
            {"text": "two", "id": "x"},
            {"text": "three", "url": 0.5},
        ]
        for number, row in enumerate(rows):
            write(datasets.Dataset.from_list([row]), str(tmp_path / kind / f"{number}.{kind}"))
        (tmp_path / kind / f"3.{kind}").touch()
        assert read(tmp_path / kind) == ["one", "two", "three"]
    empty = datasets.Dataset.from_dict({"text": []}, features=datasets.Features({"text": datasets.Value("string")}))
    empty.to_parquet(str(tmp_path / "parquet" / "4.parquet"))
    assert read(tmp_path / "parquet") == ["one", "two", "three"]
    write_jsonl(tmp_path / "jsonl" / "5.jsonl", [{"body": "four"}])
    with pytest.raises(ValueError, match=r"5\.jsonl' has no column 'text'; choose with --text_column from \['body'\]"):
        read(tmp_path / "jsonl")


def test_copies_of_heldout_texts_are_not_trained_on(tmp_path: Path) -> None:
    lines = [f"{chr(97 + n % 26)} {chr(97 + n // 26)}" for n in range(60)]
    file = write_lines(tmp_path / "a.txt", *lines, *lines, *lines)
    other = write_lines(tmp_path / "b.txt", *lines[30:], *(f"{line} more" for line in lines))
    for options in ({}, {"weights": [1, 2]}):
        train, heldout, copies = load_splits([str(file), str(other)], tiny_tokenizer(), 64, **options)
        assert not {tuple(ids) for ids in train["input_ids"]} & {tuple(ids) for ids in heldout["input_ids"]}
        assert copies > 0
        assert len(set(map(tuple, train["input_ids"]))) + len(set(map(tuple, heldout["input_ids"]))) == 120
    with pytest.raises(ValueError, match="all 19 texts to train on are copies of the 1 held-out ones"):
        splits([str(write_lines(tmp_path / "same.txt", *["one"] * 20))])


def test_what_would_be_read_twice_is_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "texts" / "a.txt", "one", "two")
    for sources in ([str(file)] * 2, [str(file.parent), str(file)]):
        with pytest.raises(ValueError, match=r"the data hold '.*a\.txt' (twice|in '.*texts' and in '.*a\.txt')"):
            splits(sources)


def test_weights_whose_sum_overflows_are_shares_all_the_same(tmp_path: Path) -> None:
    assert mixing_shares(["a", "b"], [1e308, 1e308]) == [0.5, 0.5]


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    """Each of its files, emptied or cut off."""
    (tmp_path / "lines.txt").write_text("".join(f"line {number}\n" for number in range(60)), encoding="utf-8")

    def load() -> None:
        load_splits([str(tmp_path / "lines.txt")], tiny_tokenizer(), 16)

    load()
    files = list((tmp_path / "cache").rglob("*.arrow"))
    assert len(files) == 5  # texts, two lists of rows, two of tokens
    for file in files:
        content = file.read_bytes()
        for kept in (0, len(content) // 2, -1):
            file.write_bytes(content[:kept])
            with pytest.raises(
                OSError, match=r"a file in the cache folder .*cache is damaged \(.*\): remove the folder"
            ):
                load()
        file.write_bytes(content)
    load()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "a.txt", "one", "two")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(file / "cache"))
    with pytest.raises(
        OSError, match=r"cannot write to the cache folder .*a\.txt/cache .*HF_DATASETS_CACHE or HF_HOME"
    ):
        read(file)
