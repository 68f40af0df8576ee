"""Which files of a folder are read: splits by every way of naming, documentation, foreign kinds, links."""

import json
from pathlib import Path

import datasets
import pytest

from minilm.data.files import choose_files, walk

CASES = {
    "a licence is no text": (["corpus.csv"], ["LICENSE.txt"]),
    "nor is a readme": (["a.txt", "b.txt"], ["README.txt", "readme_en.txt", "README.md", "setup.py", "LICENSE"]),
    "compressed parts": (["part-0.jsonl", "part-1.jsonl.gz", "part-2.json.zst"], []),
    "upper case": (["A.TXT", "b.txt"], ["TEST.TXT"]),
    "the split beside a readme": (["train.txt"], ["README.txt", "test.txt"]),
    "numbered shards": (
        ["train-00000-of-00001.parquet"],
        ["test-00000-of-00001.parquet", "unsupervised-00000-of-00001.parquet"],
    ),
    "numbers after a dot": (["c4-train.00000-of-01024.json.gz"], ["c4-validation.00000-of-00008.json.gz"]),
    "names with a split": (["wiki.train.tokens"], ["wiki.test.tokens", "wiki.valid.tokens"]),
    "underscores": (["imdb_train.csv"], ["imdb_test.csv", "imdb_dev.csv"]),
    "in the middle": (["en_train_a.txt", "en_train_b.txt"], ["en_test_a.txt", "en_test_b.txt"]),
    "numbers in the middle": (["x_train_1_a.txt"], ["x_val_2_a.txt"]),
    "no training split": (["a.txt", "b.txt"], ["test.txt", "b_dev.txt"]),
    "a stray file beside splits": (["train.csv"], ["test.csv", "vocabulary.txt"]),
    "folders": (["train/pos/1.txt", "train/neg/1.txt"], ["test/pos/1.txt", "dev/1.txt", "other.txt"]),
    "folders that differ in a word": (["train-clean-100/a.txt"], ["test-clean/a.txt", "train-clean-100/readme.txt"]),
    "shards without splits": (["data-00000-of-00002.parquet", "data-00001-of-00002.parquet"], ["dataset_info.json"]),
    "the word in other words": (["contest.txt", "latest.txt", "restrained.txt"], []),
    "a compressed copy": (["a.jsonl", "b.jsonl.gz"], ["a.jsonl.gz"]),
    "checksums": (["a.jsonl"], ["a.jsonl.sha256", "md5.md5"]),
}


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_read_by_its_names(tmp_path: Path, name: str) -> None:
    read, left_out = CASES[name]
    chosen = choose_files(make(tmp_path, *read, *left_out))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in chosen.files) == sorted(read)
    assert sorted(chosen.left_out) == sorted(name for name in left_out)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a.csv", "notes.txt"], r"must hold one kind .*; it holds a\.csv, notes\.txt: name those to read"),
        (["a.jsonl", "b.jsonl.lz4"], r"it holds a\.jsonl, b\.jsonl\.lz4"),
        (["a.jsonl", "b.zip"], r"it holds a\.jsonl, b\.zip"),
        (["a.parquet", "b.parquet.gz"], r"it holds a\.parquet, b\.parquet\.gz"),
        (["b.tar.gz"], r"it holds b\.tar\.gz"),
        (["test.txt", "dev/a.txt"], r"are named as dev, test, none as train: .* for example --data .*a\.txt"),
        (["LICENSE.txt"], r"holds no data .*: it holds nothing but LICENSE\.txt"),
    ],
)
def test_what_cannot_be_chosen_is_refused(tmp_path: Path, names: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        choose_files(make(tmp_path, *names))


def test_links_are_followed_and_count_once(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", "a.txt", "b.txt")
    folder = make(tmp_path / "texts", "c.txt", ".hidden/d.txt", "__pycache__/e.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked" / "round").symlink_to(folder)
    (folder / "f.txt").symlink_to(folder / "c.txt")
    assert [path.name for path in choose_files(folder).files] == ["c.txt", "a.txt", "b.txt"]
    (folder / "g.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"g\.txt' is no file that can be read: a broken link"):
        choose_files(folder)


def test_a_walk_leaves_hidden_files_out_and_ends_where_links_go_round(tmp_path: Path) -> None:
    folder = make(tmp_path / "texts", "a.txt", "below/b.txt", ".c.txt", "__d.txt", "below/.e.txt")
    (folder / "below" / "up").symlink_to(folder)
    (folder / "below" / "here").symlink_to(folder / "below")
    (folder / "linked").symlink_to(make(tmp_path / "elsewhere", "f.txt", ".g.txt"))
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert [path.relative_to(folder).as_posix() for path in walk(folder)] == ["a.txt", "below/b.txt", "linked/f.txt"]


def test_what_was_saved_to_disk_is_read_by_its_index(tmp_path: Path) -> None:
    parts = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    make(tmp_path / "saved" / "train", "cache-0123456789abcdef.arrow")
    chosen = choose_files(tmp_path / "saved")
    assert (chosen.files, chosen.left_out) == ([tmp_path / "saved/train/data-00000-of-00001.arrow"], ["test/"])
    assert choose_files(tmp_path / "saved" / "test").files == [tmp_path / "saved/test/data-00000-of-00001.arrow"]
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    with pytest.raises(ValueError, match="has the splits test, none is train"):
        choose_files(tmp_path / "saved")
