"""Reading a file: every kind and compression, from any row on, and each fault with its place."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minilm.data.faults import DataError
from minilm.data.reading import kind_of, read_rows

TEXTS = ["one", "", "two\u00e9, with a comma", 'and "quotes"', "five"]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
CSV = "id,text\n" + "".join(f'{n},"{text.replace(chr(34), 2 * chr(34))}"\n' for n, text in enumerate(TEXTS))
CONTENTS = {
    "a.txt": "\n".join(TEXTS),
    "a.TXT": "\ufeff" + "\r\n".join(TEXTS) + "\r\n",
    "mac.txt": "\r".join(TEXTS),
    "wiki.train.tokens": "\n".join(TEXTS),
    "a.csv": CSV,
    "bom.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "a.tsv": CSV.replace(',"', '\t"').replace("id,", "id\t"),
    "a.jsonl": "\n\n".join(map(json.dumps, RECORDS)),
    "a.ndjson": "\n".join(map(json.dumps, RECORDS)),
    "lines.json": "\n".join(map(json.dumps, RECORDS)),
    "array.json": json.dumps(RECORDS),
    "pretty.json": json.dumps(RECORDS, indent=1),
    "data.json": json.dumps({"version": 1, "data": RECORDS}),
    "columns.json": json.dumps({"text": TEXTS}, indent=1),
}


def write_zst(path: Path, content: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


def values(path: Path, start: int = 0, column: str = "text") -> list[Any]:
    return [value for batch in read_rows(path, column, start) for value in batch]


@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_gives_its_texts_from_any_row_on(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name].encode())
    for start in (0, 2, 5, 9):
        assert values(tmp_path / name, start) == TEXTS[start:]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".GZ"])
def test_compressed_files_are_read(tmp_path: Path, suffix: str) -> None:
    for name in ("a.txt", "a.csv", "a.jsonl"):
        path, content = tmp_path / f"{name}{suffix}", CONTENTS[name].encode()
        if suffix == ".zst":
            write_zst(path, content)
        else:
            pack = {".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, gzip.compress)
            path.write_bytes(pack(content))
        assert values(path) == TEXTS
        assert values(path, 3) == TEXTS[3:]


def test_tables_are_read_from_any_row_on(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(700)]
    table = pa.table({"text": texts, "id": range(700), "other": pa.array(texts).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=300)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=300)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        for start in (0, 299, 300, 650, 700):
            assert values(tmp_path / name, start) == texts[start:]
        assert values(tmp_path / name, 690, "other") == texts[690:]


def test_faults_name_file_and_row(tmp_path: Path) -> None:
    def fails(match: str, name: str, content: bytes, column: str = "text") -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=match):
            values(tmp_path / name, 0, column)

    line = b'{"text": "one"}\n'
    fails(
        r"'.*a\.jsonl' at row 301: no JSON \(Unterminated string .* at character 10\)",
        "a.jsonl",
        300 * line + line[:11],
    )
    fails(r"not text, in row 301 of '.*a\.jsonl'", "a.jsonl", 300 * line + b'{"text": 5}')
    fails(r"at row 3: .*surrogates not allowed", "a.jsonl", 2 * line + b'{"text": "\\ud800"}')
    fails(r"at row 3: '\[1\]' is no record with columns", "a.jsonl", 2 * line + b"[1]")
    fails(r"has no column 'text'; choose with --text_column from \['body'\]", "a.jsonl", 300 * b'{"body": "one"}\n')
    fails(r"'.*a\.csv' at row 2: it has 3 fields, the header 2", "a.csv", b"id,text\n1,one\n2,two,2\n")
    fails(r"'.*a\.csv' has no column 'text'; .* from \['id;text'\]", "a.csv", b"id;text\n1;one\n")
    fails(r"the column 'id' of '.*a\.csv' holds nothing but numbers, not text", "a.csv", b"id,text\n1,one\n", "id")
    fails(r"'.*a\.csv' at row 2: unexpected end of data", "a.csv", b'text\none\n"two\n')
    fails(r"'.*a\.txt' at row 1: the byte 0xe9 is not UTF-8; .* iconv -f latin1 -t", "a.txt", "né".encode("latin1"))
    fails(r"'.*a\.txt\.gz' at row [0-9]+: Compressed file ended", "a.txt.gz", gzip.compress(b"one\n" * 99)[:-9])
    fails(r"'.*a\.txt\.xz' at row 1: Input format not supported", "a.txt.xz", b"no archive")
    fails(r"'.*a\.txt\.zst' at row 1: .*(ZSTD|zstd|Zstd)", "a.txt.zst", b"no archive")
    fails(r"'.*a\.parquet' at row 1: Parquet magic bytes not found", "a.parquet", b"version https://git-lfs.github.com")
    fails(r"'.*a\.arrow' at row 1: ", "a.arrow", b"no table")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"the column 'text' of '.*b\.parquet' holds int64, not text"):
        values(tmp_path / "b.parquet")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_tells_what_to_convert_from(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\ntwo\n".encode(encoding))
    with pytest.raises(
        DataError, match=rf"at row 1: the byte .* is not UTF-8; .* iconv -f {encoding[:6]} -t utf-8; --on_bad"
    ):
        values(file)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv", "a.jsonl", "a.parquet", "a.arrow", "a.txt.gz"):
        (tmp_path / name).touch()
        assert values(tmp_path / name) == []


def test_what_is_not_read_has_no_kind() -> None:
    for name in ("a.parquet.gz", "a.pdf", "a", "a.gz", "a.jsonl.lz4"):
        assert kind_of(Path(name)) is None


def test_a_workers_fault_is_its_last_line() -> None:
    told = (
        "Caught DataError in DataLoader worker process 0.\nTraceback ...\nminilm.reading.DataError: cannot read 'a'\n"
    )
    assert str(DataError(told)) == "cannot read 'a'"
