"""A run that is killed at random steps and resumed ends bitwise as one that was not, whatever its data come from."""

import random
from functools import partial
from pathlib import Path

import pytest
from kill_and_resume import run
from processes import side_by_side
from tiny_text import write_lines

# 57 sequences to train on are seven steps of eight: 16 steps end in the third epoch, or pass, of them.
MODES = {
    "shuffled": ["--train_sampling_strategy", "random"],
    "by length": [],
    "packed": ["--packing"],
    "stream": ["--streaming", "--shuffle_buffer", "10"],
    "stream, packed, two workers": [
        *("--streaming", "--packing", "--shuffle_buffer", "10", "--dataloader_num_workers", "2"),
    ],
}


@pytest.mark.parametrize("mode", MODES)
def test_killed_and_resumed_is_bitwise_what_it_would_have_been(tmp_path: Path, teacher: str, mode: str) -> None:
    data = str(write_lines(tmp_path / "lines.txt", 60))
    kills = sorted(random.Random(mode).sample(range(2, 16), 3))
    (result,) = side_by_side(partial(run, tmp_path, teacher, data, kills, MODES[mode]))
    assert result["ends"] == [0, 9, 9, 9, 0]
    assert result["resumed_from"] == kills[-1] // 2 * 2 or result["resumed_from"] == (kills[-1] - 1) // 2 * 2
    assert result["losses"][0] == result["losses"][1]
    assert result["equal"]
