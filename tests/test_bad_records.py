"""Rows that cannot be read: a run stops at the first with its place, or passes over them all and counts them."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CommandLine
from tiny_text import lines, tiny_tokenizer

from minilm.data.faults import DataError
from minilm.data.reading import read_rows, try_file
from minilm.data.streams import TextStream
from minilm.training.trainer import DistillationTrainer

BAD = "bad"
FILES: dict[str, tuple[bytes, list[str | None]]] = {
    "a.txt": (b"one\ncaf\xe9\n\xff\xfe\ntwo\n", ["one", BAD, BAD, "two"]),
    "first.txt": (b"caf\xe9\none\n", [BAD, "one"]),
    "mac.txt": (b"one\rcaf\xe9\rtwo", ["one", BAD, "two"]),
    "a.csv": (
        b'id,text\n1,one\n2,two,2\n3,"three"x\n4,four\nf\xe9,five\n6,"si\nx"\n7,seven\n',
        ["one", BAD, BAD, "four", BAD, "si\nx", "seven"],
    ),
    "a.jsonl": (
        b'{"text": "one"}\n{"text": "tw\n[3]\n{"text": 4}\n{"text": "\\ud800"}\n{"text": "\xe9"}\n{"id": 7}\n'
        + b"[" * 100_000
        + b'\n{"text": "nine"}\n',
        ["one", BAD, BAD, BAD, BAD, BAD, None, BAD, "nine"],
    ),
    "first.jsonl": (b'{"text": "on\n{"text": "two"}\n{"text": "three"}\n', [BAD, "two", "three"]),
    "array.json": (b'[{"text": "one"}, 2, {"text": "three"}]', ["one", BAD, "three"]),
}


def rows(path: Path, start: int = 0) -> list[str | None]:
    values = itertools.chain.from_iterable(read_rows(path, "text", start, skip=True))
    return [BAD if isinstance(value, DataError) else value for value in values]


@pytest.mark.parametrize("name", FILES)
def test_a_bad_row_is_passed_over_and_no_other(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    for start in range(len(expected) + 1):
        assert rows(path, start) == expected[start:]
    first = expected.index(BAD)
    told: list[Any] = []
    with pytest.raises(DataError, match=rf"(?s)row {first + 1}\b.*; --on_bad_record skip passes over such rows$"):
        told.extend(itertools.chain.from_iterable(read_rows(path, "text")))
    assert told == expected[:first]
    with pytest.raises(DataError, match="--on_bad_record skip"):
        try_file(path, "text")
    try_file(path, "text", skip=True)


def test_a_bad_cell_of_a_table_is_passed_over(tmp_path: Path) -> None:
    cells = pa.array([b"one", b"caf\xe9", b"three", None]).view(pa.string())
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), pa.schema({"text": pa.string()})) as stream:
        stream.write_table(pa.table({"text": cells}))
    for name in ("a.parquet", "a.arrow"):
        assert rows(tmp_path / name) == ["one", BAD, "three", None]


def test_a_quote_that_is_never_closed_stops_all_the_same(tmp_path: Path) -> None:
    """It takes the rest of the file into one record: nobody knows how many were lost."""
    (tmp_path / "a.csv").write_bytes(b'text\none\n"two\nthree\nfour\n')
    with pytest.raises(DataError, match=r"at row 2: unexpected end of data$"):
        rows(tmp_path / "a.csv")


def words(count: int) -> list[str]:
    return [bin(number)[2:].replace("0", "a").replace("1", "b") for number in range(1, count + 1)]


def with_bad_lines(path: Path, count: int, every: int) -> Path:
    """Distinct texts, and before each `every`th a line that is not UTF-8."""
    bad = [b"caf\xe9\n" * (number % every == 0) + f"{word}\n".encode() for number, word in enumerate(words(count), 1)]
    path.write_bytes(b"".join(bad))
    return path


@pytest.mark.parametrize(("files", "readers"), [(1, 1), (1, 3), (3, 2)])
def test_the_readers_of_a_stream_count_each_bad_row_once(tmp_path: Path, files: int, readers: int) -> None:
    for number in range(files):
        with_bad_lines(tmp_path / f"{number}.txt", 60, 7)
    states, heldout = [], set()
    for rank in range(readers):
        stream = TextStream(
            [str(tmp_path)], tiny_tokenizer(), batch_size=5, max_length=16, shuffle_buffer=9, heldout=5 * files,
            rank=rank, world_size=readers, on_bad_record="skip",
        )  # fmt: skip
        heldout.add(stream.heldout_bad)
        batches = itertools.takewhile(lambda batch: epoch(batch) < 3, stream)
        seen = [batch["stream_state"] for batch in batches]
        assert [state["bad"] for state in seen] == sorted(state["bad"] for state in seen)
        states.append(seen[-1])
        again = TextStream(
            [str(tmp_path)], tiny_tokenizer(), batch_size=5, max_length=16, shuffle_buffer=9, heldout=5 * files,
            rank=rank, world_size=readers, on_bad_record="skip",
        )  # fmt: skip
        again.load_state([seen[2]])
        rest = [next(iter(again))["stream_state"]]
        assert rest == seen[3:4]
    assert sum(state["bad"] for state in states) + heldout.pop() == 8 * files
    assert not heldout


def epoch(batch: dict[str, Any]) -> int:
    return int(batch["stream_state"]["positions"][0]["epoch"])


RUN = [
    *("--student_num_layers", "2", "--max_length", "12", "--per_device_train_batch_size", "4", "--use_cpu"),
    *("--disable_tqdm", "true", "--output_dir", "out", "--max_steps", "20", "--save_steps", "4"),
]


@pytest.mark.parametrize("flags", [[], ["--streaming", "--shuffle_buffer", "8", "--dataloader_num_workers", "1"]])
def test_the_report_counts_what_was_passed_over(command: CommandLine, teacher: str, flags: list[str]) -> None:
    content = [line.encode() for line in lines(40)]
    Path("lines.txt").write_bytes(b"\n".join([b"\xe9", *content[:30], b"\xe9", *content[30:], b"\xe9"]))
    argv = ("--teacher", teacher, "--data", "lines.txt", *RUN, *flags)
    code, _, err = command(*argv)
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot read 'lines.txt' at row 1: the byte 0xe9 is not UTF-8" in err
    code, _, err = command(*argv, "--on_bad_record", "skip")
    assert (code, err) == (0, "")
    assert json.loads(Path("out/metrics.json").read_text())["data"]["bad_records"] == 3
    assert "; 3 rows that cannot be read passed over" in Path("out/report.md").read_text()


def test_a_run_that_has_stopped_goes_on_past_the_row(
    command: CommandLine, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\n".join(lines(400)).encode()
    Path("lines.txt").write_bytes(content)
    original = DistillationTrainer.get_train_dataloader

    def spoil(self: Any) -> Any:
        """After the start, which looks through so small a file for held-out texts."""
        Path("lines.txt").write_bytes(content[:1500] + b"\xe9" + content[1501:])
        return original(self)

    argv = ("--teacher", teacher, "--data", "lines.txt", *RUN, "--streaming", "--shuffle_buffer", "8")
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "get_train_dataloader", spoil)
        code, _, err = command(*argv)
    assert code == 1
    assert re.search(
        r"row \d+: .*; --on_bad_record skip passes over such rows; a checkpoint of step \d+ was saved", err
    )
    again = ("--resume_from_checkpoint", "auto", "--on_bad_record", "skip")
    with monkeypatch.context() as patch:
        # Of the data as they were: what was spoilt under the run is another file.
        Path("lines.txt").write_bytes(content)
        patch.setattr(DistillationTrainer, "get_train_dataloader", spoil)
        code, _, err = command(*argv, *again)
    assert (code, err) == (0, "")
    assert json.loads(Path("out/metrics.json").read_text())["data"]["bad_records"] == 1


def test_images_have_no_rows_to_pass_over(command: CommandLine, tmp_path: Path) -> None:
    from tiny_models import tiny_model
    from transformers import ViTImageProcessor

    tiny_model("vit").save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    Path("images").mkdir()
    argv = ("--teacher", str(tmp_path / "vit"), "--data", "images", *RUN[:2], *RUN[4:], "--on_bad_record", "skip")
    code, _, err = command(*argv)
    assert code == 2
    assert err.endswith("minilm-train: error: --on_bad_record skip is for texts, and the teacher takes images\n")
