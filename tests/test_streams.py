"""Streams: what is read and by whom, the share of each source, and going on from a state as if never interrupted."""

import itertools
import json
import re
import string
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from tiny_text import tiny_tokenizer

from minilm.data.faults import DataError
from minilm.data.formats import _Raw
from minilm.data.streams import TextStream

Batch = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def word(number: int) -> str:
    """Distinct, of letters alone, which the tokenizer tells apart, and some much longer than others."""
    return "".join(string.ascii_lowercase[int(digit)] for digit in str(number)) + "z" * (8 if number % 7 == 3 else 0)


def numbers(batches: Sequence[Batch]) -> list[int]:
    """The texts of unpacked batches, by their number."""
    tokenizer = tiny_tokenizer()
    texts = [
        tokenizer.decode(ids[mask.bool()][1:-1]).replace(" ##", "").rstrip("z")
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return [int("".join(str(string.ascii_lowercase.index(letter)) for letter in text)) for text in texts]


def write(folder: Path, *sizes: int, first: int = 1) -> str:
    """A folder with a file of so many texts each; the texts are the words of first, first + 1, ..."""
    folder.mkdir()
    count = itertools.count(first)
    for index, size in enumerate(sizes):
        text = "".join(f"{word(next(count))}\n" for _ in range(size))
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def stream(*sources: str, **options: Any) -> TextStream:
    options = {"batch_size": 4, "max_length": 32, "shuffle_buffer": 16, "heldout": 2, **options}
    return TextStream(sources, tiny_tokenizer(), **options)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def assert_same(actual: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["stream_state"] == other["stream_state"]
        for name in one.keys() - {"stream_state"}:
            assert torch.equal(one[name], other[name]), name


def test_a_pass_reads_every_text_once_in_another_order_each_time(tmp_path: Path) -> None:
    texts = stream(write(tmp_path / "a", 30, 32), batch_size=6)  # two held out
    assert list(texts.heldout["text"]) == [word(1), word(2)]
    first, second = numbers(take(iter(texts), 10)), numbers(take(iter(texts), 20)[10:])
    assert sorted(first) == sorted(second) == list(range(3, 63))
    assert first != second
    assert first[:8] != sorted(first[:8])
    starts = [number <= 30 for number in numbers(take(iter(texts), 80)[::10])]
    assert {True, False} <= set(starts)  # not always the same file first
    assert numbers(take(iter(stream(write(tmp_path / "b", 30, 32), batch_size=6)), 10)) == first
    assert numbers(take(iter(stream(str(tmp_path / "b"), batch_size=6, seed=1)), 10)) != first


def test_a_block_is_shuffled_within_itself(tmp_path: Path) -> None:
    order = numbers(take(iter(stream(write(tmp_path / "a", 62), batch_size=4)), 15))
    assert [sorted(order[start : start + 16]) for start in range(0, 60, 16)] == [
        list(range(3, 63))[start : start + 16] for start in range(0, 60, 16)
    ]
    assert [number + 16 for number in order[:16]] != order[16:32]


@pytest.mark.parametrize("sizes", [(22, 20, 20, 20), (82,)], ids=["dealt files", "every n-th text"])
def test_the_readers_of_all_ranks_share_a_pass(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    source = write(tmp_path / "a", *sizes)
    seen = []
    for rank in range(2):
        loader = stream(source, rank=rank, world_size=2, num_workers=2).loader()
        batches = take(iter(loader), 10)
        assert [batch["stream_state"]["reader"] for batch in batches] == [2 * rank, 2 * rank + 1] * 5
        seen += numbers(batches)
    assert sorted(seen) == list(range(3, 83))


def test_blank_lines_do_not_decide_who_reads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{word(n)}\n \n" for n in range(1, 35)), encoding="utf-8")
    loader = stream(str(tmp_path / "a.txt"), num_workers=2, heldout=1).loader()
    assert len(set(numbers(take(iter(loader), 8)))) == 32


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_files_and_columns(tmp_path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_dict({"id": list(range(42)), "body": [word(n) for n in range(1, 43)]})
    path = str(tmp_path / f"a.{kind}")
    rows.to_parquet(path) if kind == "parquet" else rows.to_json(path)
    loader = stream(path, text_column="body", num_workers=2).loader()
    assert sorted(numbers(take(iter(loader), 10))) == list(range(3, 43))


def test_weights_give_the_share_of_each_source(tmp_path: Path) -> None:
    small, large = write(tmp_path / "a", 42), write(tmp_path / "b", 342, first=1001)
    texts = stream(small, large, weights=[3, 1], batch_size=50, heldout=4)
    assert list(texts.heldout["text"]) == [word(n) for n in (1, 2, 1001)]  # one in twenty of the small source
    drawn = numbers(take(iter(texts), 20))
    from_small = [number for number in drawn if number < 1000]
    assert len(from_small) / len(drawn) == pytest.approx(0.75, abs=0.04)
    assert len(set(from_small)) == 40
    repeats = Counter(from_small).values()
    assert max(repeats) - min(repeats) <= 1


def test_without_weights_the_files_of_all_sources_are_one(tmp_path: Path) -> None:
    texts = stream(write(tmp_path / "a", 21), write(tmp_path / "b", 61, first=22), batch_size=10)
    assert sorted(numbers(take(iter(texts), 8))) == [*range(2, 22), *range(23, 83)]


def test_the_heldout_part_may_end_in_a_later_file(tmp_path: Path) -> None:
    texts = stream(write(tmp_path / "a", 3, 3, 154), heldout=5, batch_size=31)
    assert list(texts.heldout["text"]) == [word(n) for n in range(1, 6)]
    assert sorted(numbers(take(iter(texts), 10))) == sorted(2 * list(range(6, 161)))


RESUMED = {
    "padded": {},
    "packed": {"packing": True},
    "weighted": {"weights": [2, 1]},
    "weighted and packed": {"weights": [2, 1], "packing": True},
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_stream_goes_on_as_if_never_interrupted(
    tmp_path: Path, options: dict[str, Any], num_workers: int
) -> None:
    sources = write(tmp_path / "a", 12, 20, 10), write(tmp_path / "b", 50, first=1001)
    options = {**options, "num_workers": num_workers}
    whole = take(iter(stream(*sources, **options).loader()), 46)
    assert max(position["epoch"] for position in whole[-1]["stream_state"]["positions"]) >= 1  # it wrapped
    for stops in [(1,), (7,), (40,), (5, 12)]:
        states: dict[int, str] = {}
        actual: list[Batch] = []
        for stop in (*stops, len(whole)):
            texts = stream(*sources, **options)
            texts.load_state([json.loads(state) for state in states.values()])
            new = take(iter(texts.loader()), stop - len(actual))
            states |= {batch["stream_state"]["reader"]: json.dumps(batch["stream_state"]) for batch in new}
            actual += new
        assert_same(actual, whole)


def test_every_position_can_be_gone_on_from(tmp_path: Path) -> None:
    sources = write(tmp_path / "a", 12, 9), write(tmp_path / "b", 14, first=1001)
    for options in ({}, {"packing": True, "batch_size": 1, "weights": [1, 1]}):
        whole = take(iter(stream(*sources, **options)), 30)
        for number, batch in enumerate(whole[:-2]):
            texts = stream(*sources, **options)
            texts.load_state([batch["stream_state"]])
            assert_same(take(iter(texts), 2), whole[number + 1 : number + 3])


def test_a_state_is_not_changed_by_reading_on(tmp_path: Path) -> None:
    batches = iter(stream(write(tmp_path / "a", 42), packing=True, batch_size=1))
    state = next(batches)["stream_state"]
    before = json.dumps(state)
    take(batches, 5)
    assert json.dumps(state) == before
    assert len(before) < 4000


def test_packed_batches_hold_every_text_once(tmp_path: Path) -> None:
    batches = take(iter(stream(write(tmp_path / "a", 142), packing=True, batch_size=2)), 60)
    assert set(batches[0]) == {
        *("input_ids", "position_ids", "sequence_ids", "cu_seqlens", "token_index", "stream_state")
    }
    assert batches[0]["input_ids"].shape == (2, 32)
    tokenizer = tiny_tokenizer()
    found: Counter[str] = Counter()
    for batch in batches:
        tokens = batch["input_ids"].flatten()[batch["token_index"]]
        found.update(tokenizer.decode(tokens[i:j]) for i, j in itertools.pairwise(batch["cu_seqlens"].tolist()))
    state = batches[-1]["stream_state"]
    still_held = itertools.chain(*json.loads(state["rows"]))
    found.update(tokenizer.decode(sequence) for row in still_held for sequence in row)
    passes = state["positions"][0]["epoch"]
    assert passes >= 3
    assert len(found) == 140
    assert set(found.values()) == {passes, passes + 1}
    assert found.total() == state["drawn"]


def test_a_state_of_another_stream_is_refused(tmp_path: Path) -> None:
    source, other = write(tmp_path / "a", 60), write(tmp_path / "b", 60)
    state = next(iter(stream(source)))["stream_state"]

    def refused(match: str, states: list[dict[str, Any]], *sources: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            stream(*(sources or [source]), **options).load_state(states)

    refused(r"its sources is \['.*b'\], the state's \['.*a'\]", [state], other)
    refused("its seed is 1, the state's 0", [state], seed=1)
    refused("its packing is True, the state's False", [state], packing=True)
    refused("its batch_size is 3, the state's 4", [state], batch_size=3)
    refused("its readers is 2, the state's 1", [state], num_workers=2)
    refused("its readers is 2, the state's 1", [state], world_size=2)
    refused(r"its weights is \[1\], the state's None", [state], weights=[1])
    refused("its files is", [state | {"settings": state["settings"] | {"files": [2]}}])

    two = [batch["stream_state"] for batch in take(iter(stream(source, num_workers=2).loader()), 5)]
    refused(r"batches \{1: 2\} by reader; on rank 0 after 2 batches .* \{0: 1, 1: 1\}", two[3:4], num_workers=2)
    refused(r"batches \{0: 3, 1: 1\} by reader", [two[4], two[1]], num_workers=2)
    ranks = {"world_size": 2, "rank": 1}
    first_of_rank_0 = next(iter(stream(source, world_size=2)))["stream_state"]
    refused(r"batches \{0: 1\} by reader; on rank 1 .* \{1: 1\}", [first_of_rank_0], **ranks)
    stream(source, num_workers=2).load_state(two[3:])


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    def fails(match: str, source: Path | str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            stream(str(source), **options)

    rows = tmp_path / "a.jsonl"
    rows.write_text('{"body": "one", "id": 1}\n' * 9, encoding="utf-8")
    fails(r"has no column 'text'; choose with --text_column from \['body', 'id'\]", rows)
    fails("the column 'id' holds 1, not text", rows, text_column="id")
    fails("there is no file or folder", tmp_path / "missing.txt")
    fails("cannot load the data 'no/such-name'", "no/such-name")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"', encoding="utf-8")
    fails("cannot read '.*broken.jsonl' at row 1: no JSON", tmp_path / "broken.jsonl")
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    fails("'.*blank.txt' holds no text: all rows of its column 'text' are empty", tmp_path / "blank.txt")
    (tmp_path / "empty.txt").touch()
    fails("holds no text: the file is empty", tmp_path / "empty.txt")
    fails("hold 1 text; at least 2", write(tmp_path / "one", 1))
    fails("2 weights for 1 sources", rows, weights=[1, 2])
    fails("batch_size must be at least 1, not 0", rows, batch_size=0)
    fails("2 texts to train on, fewer than the stream's 3 readers", write(tmp_path / "few", 3), world_size=3)


def test_a_reader_that_never_finds_a_text_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stream(write(tmp_path / "a", 30))
    file = tmp_path / "a" / "0.txt"
    file.write_text("\n" * file.stat().st_size, encoding="utf-8")
    with pytest.raises(ValueError, match="reader 0 of 1 found no text in 100 passes over 1 files"):
        next(iter(texts))


def test_an_empty_file_is_passed_over(tmp_path: Path) -> None:
    texts = stream(write(tmp_path / "a", 8, 0, 8), world_size=3, rank=2, heldout=1, batch_size=1)
    epochs = [batch["stream_state"]["positions"][0]["epoch"] for batch in take(iter(texts), 60)]
    assert any(right - left > 1 for left, right in itertools.pairwise(epochs))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_left_alone(tmp_path: Path, num_workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = take(iter(stream(write(tmp_path / "a", 42), num_workers=num_workers).loader()), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_same(take(iter(stream(str(tmp_path / "a"), num_workers=num_workers).loader()), 5), first)


def test_the_loader_must_be_the_streams_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stream(write(tmp_path / "a", 30))
    # As in a worker; a real one that raises is waited for five seconds.
    monkeypatch.setattr("minilm.data.streams.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(ValueError, match="the loader has 2 workers, the stream was made for 0"):
        next(iter(texts))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_in_reading_is_one_sentence_with_file_and_row(tmp_path: Path, num_workers: int) -> None:
    lines = [f"{word(number)}\n".encode() for number in range(1, 400)]
    (tmp_path / "a.txt").write_bytes(b"".join(lines[:300]) + b"caf\xe9\n" + b"".join(lines[300:]))
    batches = stream(str(tmp_path / "a.txt"), num_workers=num_workers).loader()
    with pytest.raises(DataError) as caught:
        list(batches)
    assert re.fullmatch(
        r"cannot read '.*/a\.txt' at row 301: the byte 0xe9 is not UTF-8; convert the file, .*", str(caught.value)
    )


def test_a_fault_in_a_files_first_rows_is_told_before_anything_is_read(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "a", 30, 30))
    (folder / "1.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"cannot read '.*1\.txt' at row 1: the byte 0xe9"):
        stream(str(folder))
    datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(str(tmp_path / "b.parquet"))
    datasets.Dataset.from_dict({"body": ["one"]}).to_parquet(str(tmp_path / "c.parquet"))
    with pytest.raises(ValueError, match=r"c\.parquet' has no column 'text'; choose .* from \['body'\]"):
        stream(str(tmp_path / "b.parquet"), str(tmp_path / "c.parquet"))


def test_a_file_that_is_deleted_is_named(tmp_path: Path) -> None:
    texts = stream(write(tmp_path / "a", 30))
    (tmp_path / "a" / "0.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read '.*0\.txt' at row .*: No such file or directory"):
        next(iter(texts))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_slow_storage_changes_nothing_but_the_time(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read gives a few bytes after a while; the workers read ahead while a step is taken."""
    source = write(tmp_path / "a", 30, 30)
    options: dict[str, Any] = {"num_workers": num_workers, "shuffle_buffer": 4}
    expected = take(iter(stream(source, **options).loader()), 12)
    reads = []

    def slow(self: _Raw, buffer: Any) -> int:
        reads.append(time.sleep(0.005))
        chunk = self._stream.read(min(16, len(buffer)))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    monkeypatch.setattr(_Raw, "readinto", slow)
    assert_same(take(iter(stream(source, **options).loader()), 12), expected)
    assert len(reads) > 10


@pytest.mark.parametrize("change", [-8, 8])
def test_a_file_that_changes_under_a_run_is_told_before_half_a_text_is_trained_on(
    tmp_path: Path, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut off, or added to, while a block is read; and between two passes."""
    monkeypatch.setattr("minilm.data.formats.ROWS_AT_ONCE", 4)
    texts = stream(write(tmp_path / "a", 60), shuffle_buffer=4, batch_size=2)
    file = tmp_path / "a" / "0.txt"
    whole = file.read_bytes()
    reading = iter(texts)
    assert len(take(reading, 2)) == 2
    file.write_bytes(whole[:change] if change < 0 else whole + b"a" * change)
    told = rf"0\.txt' has changed since it was first read: it had {len(whole)} bytes, and has {len(whole) + change} now"
    with pytest.raises(DataError, match=told):
        next(reading)
    with pytest.raises(DataError, match=told):
        next(iter(texts))


def test_copies_of_heldout_texts_are_passed_over(tmp_path: Path) -> None:
    words = [word(number) for number in (*range(1, 42), 1, 2, 1)]
    (tmp_path / "a.txt").write_text("\n".join(words), encoding="utf-8")
    batches = take(iter(stream(str(tmp_path / "a.txt"), batch_size=3)), 26)  # two passes
    assert sorted(numbers(batches)) == sorted(2 * list(range(3, 42)))
