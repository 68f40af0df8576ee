"""A clock that is set while a run trains, back by a year or years ahead: rates, intervals and the end stay right."""

import json
import math
import time
from pathlib import Path

import pytest
from conftest import CommandLine

YEAR = 365 * 86_400.0
RUN = [
    *("--student_num_layers", "2", "--max_length", "12", "--per_device_train_batch_size", "4", "--max_steps", "6"),
    *("--use_cpu", "--output_dir", "out", "--logging_steps", "1", "--save_steps", "2", "--save_total_limit", "0"),
    *("--eval_strategy", "steps", "--eval_steps", "3"),
]


@pytest.mark.parametrize("jump", [-YEAR, 3 * YEAR])
def test_a_run_goes_on_when_the_clock_jumps(
    command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """At every look at it; the bars are shown."""
    now, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return max(0.0, now() + jump * (looks[0] % 40))

    monkeypatch.setattr(time, "time", jumping)
    code, _, err = command("--teacher", teacher, "--data", data, *RUN)
    assert code == 0, err
    assert looks[0] > 5
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]
    metrics = json.loads(Path("out/metrics.json").read_text())
    log = json.loads(Path("out/checkpoint-6/trainer_state.json").read_text())["log_history"]
    rates = [row[name] for row in log for name in row if name.endswith(("_per_second", "_runtime"))]
    rates += [metrics["seconds"], *metrics["training"].values()]
    assert len(rates) > 6
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates), rates
    assert "-1 day" not in err
