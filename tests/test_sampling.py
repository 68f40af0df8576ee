"""The order of an epoch: a permutation from (seed, epoch) alone, and with lengths one that saves padding."""

import itertools
import random

import numpy as np
import pytest
import torch

from minilm.data.sampling import EpochSampler

SIZE, BATCH = 1003, 8  # the last batch has 3
LENGTHS = [random.Random(index).randint(3, 200) for index in range(SIZE)]


def order(epoch: int = 0, seed: int = 0, grouped: bool = False) -> list[int]:
    sampler = EpochSampler(SIZE, seed, lengths=LENGTHS if grouped else None, batch_size=BATCH)
    sampler.set_epoch(epoch)
    return list(sampler)


def padding(indices: list[int]) -> int:
    batches = [[LENGTHS[i] for i in indices[start : start + BATCH]] for start in range(0, len(indices), BATCH)]
    return sum(len(batch) * max(batch) - sum(batch) for batch in batches)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_is_a_permutation_from_seed_and_epoch(grouped: bool) -> None:
    first = order(grouped=grouped)
    assert sorted(first) == list(range(SIZE)) != first
    assert order(grouped=grouped) == first
    assert order(epoch=1, grouped=grouped) != first
    assert order(seed=1, grouped=grouped) != first
    assert order(epoch=1, seed=0, grouped=grouped) != order(epoch=0, seed=1, grouped=grouped)


@pytest.mark.parametrize("grouped", [False, True])
def test_no_global_generator_is_read_or_advanced(grouped: bool) -> None:
    def states() -> tuple[list[int], str, object]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    torch.manual_seed(1)
    before = states()
    first = order(grouped=grouped)
    assert states() == before
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert order(grouped=grouped) == first


def test_grouping_by_length_saves_padding_and_leaves_the_batches_mixed() -> None:
    grouped = order(grouped=True)
    assert padding(grouped) < padding(order()) / 5
    longest = [max(LENGTHS[i] for i in grouped[start : start + BATCH]) for start in range(0, SIZE, BATCH)]
    rises = sum(left < right for left, right in itertools.pairwise(longest))
    assert rises > len(longest) / 3  # sorted mega-batches would rise only from one to the next


def test_a_set_smaller_than_a_batch_and_an_empty_one_are_visited() -> None:
    assert sorted(EpochSampler(3, 0, lengths=[5, 6, 7], batch_size=8)) == [0, 1, 2]
    assert list(EpochSampler(0, 0, lengths=[], batch_size=8)) == []


def test_errors_name_both_values() -> None:
    with pytest.raises(ValueError, match="2 lengths for 3 sequences"):
        EpochSampler(3, 0, lengths=[1, 2])
    with pytest.raises(ValueError, match="at least 1, not 0"):
        EpochSampler(3, 0, lengths=[1, 2, 3], batch_size=0)
