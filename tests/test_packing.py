"""Packing: nothing lost or split, rows well filled, the batch's tensors, the mask, and a model under it."""

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_models import tiny_model

from minilm.data.packing import OPEN_ROWS, Packer, PackingCollator, Row, pack, row_features
from minilm.models.batches import block_diagonal_mask

LENGTH = 32


def sequences(count: int = 300, longest: int = LENGTH, seed: int = 0) -> list[list[int]]:
    """Of distinct content, so that one which was split or mixed with another shows."""
    lengths = random.Random(seed)
    return [[1000 * index + place for place in range(lengths.randint(1, longest))] for index in range(count)]


def pack_all(packer: Packer, incoming: list[list[int]]) -> list[Row]:
    return [row for sequence in incoming for row in packer.add(sequence)] + packer.flush()


def test_every_sequence_is_in_one_row_whole_and_no_row_is_too_long() -> None:
    incoming = sequences()
    rows = pack_all(Packer(LENGTH), incoming)
    assert sorted(sequence for row in rows for sequence in row) == incoming
    assert max(sum(map(len, row)) for row in rows) == LENGTH
    fill = sum(map(len, incoming)) / (LENGTH * len(rows))
    assert fill > 0.92  # one sequence a row would give 0.52


def test_a_sequence_goes_where_it_leaves_the_least_room() -> None:
    packer = Packer(10)
    for size in (5, 6, 4):
        assert (packer.add([size] * size) == []) == (size > 4)  # 4 fills the row of 6, which closes
    assert packer.rows == [[[5] * 5]]


def test_a_full_window_closes_its_fullest_row_and_a_row_that_is_full() -> None:
    packer = Packer(10)
    for index in range(OPEN_ROWS):
        assert packer.add([index] * (8 if index == 5 else 7)) == []
    assert packer.add([99] * 10) == [[[5] * 8], [[99] * 10]]
    assert len(packer.rows) == OPEN_ROWS - 1


def test_the_open_rows_are_all_of_the_state() -> None:
    incoming = sequences()
    packer, whole = Packer(LENGTH), pack_all(Packer(LENGTH), incoming)
    first = [row for sequence in incoming[:150] for row in packer.add(sequence)]
    state = packer.rows
    packer.add([7])
    assert first + pack_all(Packer(LENGTH, state), incoming[150:]) == whole


def test_empty_sequences_are_dropped_and_too_long_ones_refused(tmp_path: Path) -> None:
    packer = Packer(4)
    assert packer.add([]) == packer.rows == []
    with pytest.raises(ValueError, match="5 tokens does not fit a row of 4"):
        packer.add([1] * 5)
    with pytest.raises(ValueError, match="5 tokens does not fit a row of 4"):
        pack(datasets.Dataset.from_dict({"input_ids": [[1] * 5]}), 4)


def test_an_indexed_data_set_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming = sequences()
    path = str(tmp_path / "sequences.parquet")
    datasets.Dataset.from_dict({"input_ids": incoming, "attention_mask": incoming}).to_parquet(path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def packed(max_length: int) -> datasets.Dataset:
        return pack(datasets.load_dataset("parquet", data_files=path, split="train"), max_length)

    rows = packed(LENGTH)
    assert rows.column_names == ["input_ids", "lengths"]
    assert list(rows) == [row_features(row) for row in pack_all(Packer(LENGTH), incoming)]
    monkeypatch.setattr(Packer, "add", None)  # a second time would fail
    assert list(packed(LENGTH)) == list(rows)
    with pytest.raises(TypeError):
        packed(LENGTH + 1)


def batch(*rows: Row, max_length: int = 6) -> dict[str, torch.Tensor]:
    return PackingCollator(pad_token_id=9, max_length=max_length)([row_features(row) for row in rows])


def test_the_collator_gives_positions_sequences_and_where_the_tokens_are() -> None:
    packed = batch([[1, 2, 3], [4]], [[5, 6], [7, 8, 1, 2]])
    expected: dict[str, Any] = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 9, 9], [5, 6, 7, 8, 1, 2]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 0, 0], [0, 1, 0, 1, 2, 3]]),
        "sequence_ids": torch.tensor([[1, 1, 1, 2, 0, 0], [1, 1, 2, 2, 2, 2]], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 3, 4, 6, 10], dtype=torch.int32),
        "token_index": torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 10, 11]),
    }
    assert packed.keys() == expected.keys()
    for name, tensor in packed.items():
        assert tensor.dtype == expected[name].dtype, name
        torch.testing.assert_close(tensor, expected[name])
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit the max_length of 2"):
        batch([[1], [2, 3]], max_length=2)


@pytest.mark.parametrize("causal", [False, True])
def test_the_mask_allows_the_pairs_within_a_sequence(causal: bool) -> None:
    ids = batch([[1, 2, 3], [4]], [[5, 6], [7, 8, 1, 2]])["sequence_ids"]
    mask = block_diagonal_mask(ids, causal)
    assert mask.shape == (2, 1, 6, 6)
    assert mask.dtype == torch.bool
    for row in range(2):
        for i in range(6):
            for j in range(6):
                allowed = bool(ids[row, i] == ids[row, j]) and (j <= i or not causal)
                assert bool(mask[row, 0, i, j]) == allowed
    assert mask.any(-1).all()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_computes_for_packed_sequences_what_it_does_for_each_alone(family: str) -> None:
    model = tiny_model(family)
    parts = [[10, 11, 12], [13], [14, 15], [16, 17, 18, 19]]
    packed = batch(parts[:2], parts[2:])
    mask = block_diagonal_mask(packed["sequence_ids"], causal=family == "llama")
    with torch.no_grad():
        states = model(packed["input_ids"], attention_mask=mask, position_ids=packed["position_ids"]).last_hidden_state
        tokens = states.flatten(0, 1)[packed["token_index"]]
        for number, part in enumerate(parts):
            start, end = packed["cu_seqlens"][number : number + 2]
            alone = model(torch.tensor([part])).last_hidden_state[0]
            torch.testing.assert_close(tokens[start:end], alone, rtol=1e-4, atol=1e-5)
