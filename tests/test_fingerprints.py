"""Fingerprints of data: the content alone decides, of small files every byte, of large ones sizes and samples."""

import os
from pathlib import Path

import pytest

from minilm.data import fingerprints
from minilm.data.fingerprints import fingerprint_files, fingerprint_texts


def test_content_and_order_count_names_places_and_times_do_not(tmp_path: Path) -> None:
    contents = {"a.txt": b"one\n", "b.txt": b"two\n"}
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / f"{folder}-{name}").write_bytes(content)
            os.utime(tmp_path / folder / f"{folder}-{name}", (1, 1 if folder == "here" else 2))
    here, there = (sorted((tmp_path / folder).iterdir()) for folder in ("here", "there"))
    assert fingerprint_files(here) == fingerprint_files(there)
    assert fingerprint_files(here[::-1]) != fingerprint_files(here)
    assert fingerprint_files(here[:1]) != fingerprint_files(here)
    there[1].write_bytes(b"twO\n")
    assert fingerprint_files(here) != fingerprint_files(there)
    there[0].write_bytes(b"one\nt")  # the same bytes, another border between the files
    there[1].write_bytes(b"wo\n")
    assert fingerprint_files(here) != fingerprint_files(there)


def test_of_large_files_sizes_and_samples_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "HASHED_BYTES", 2**15)
    monkeypatch.setattr(fingerprints, "MIN_BLOCK", 64)
    file = tmp_path / "large"
    content = bytearray(os.urandom(2**18))
    file.write_bytes(content)
    before = fingerprint_files([file])
    for place in (0, 2**18 - 1):
        changed = content.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        assert fingerprint_files([file]) != before
    file.write_bytes(content + b"\n")
    assert fingerprint_files([file]) != before
    file.write_bytes(content)
    assert fingerprint_files([file]) == before


def test_of_many_files_all_sizes_and_some_contents_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "MAX_FILES", 2)
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        file.write_bytes(b"content")
    before = fingerprint_files(files)
    files[2].write_bytes(b"another")
    assert fingerprint_files(files) != before
    files[2].write_bytes(b"content")
    files[3].write_bytes(b"longer than it was")
    assert fingerprint_files(files) != before


def test_texts_count_with_their_borders() -> None:
    assert fingerprint_texts(["ab", "c"]) != fingerprint_texts(["a", "bc"]) != fingerprint_texts(["abc"])
    assert fingerprint_texts(iter(["ab", "c"])) == fingerprint_texts(["ab", "c"])
