"""`minilm-train --check`: the band's arithmetic, what is compared, which flags go with it, the reference run."""

import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from scipy.stats import t as student_t
from test_readme import README, ROOT
from transformers import TrainerCallback, TrainingArguments

from minilm.cli import check, demo
from minilm.cli.arguments import DEMO, parse
from minilm.cli.check import PREFIXES, REFERENCE, STEPS, TOLERANCE, WINDOW, bands, compare, tell, window_means
from minilm.data.sampling import MEGA_BATCH

sys.path.insert(0, str(ROOT / "bench"))

import reference_run

SHIPPED = json.loads(REFERENCE.read_text(encoding="utf-8"))


def test_the_mean_of_a_window_stands_at_its_end() -> None:
    assert window_means({0: 8.0, 10: 1.0, 50: 3.0, 60: 5.0, 100: 6.0, 101: 7.0}) == {
        0: 8.0,
        50: 2.0,
        100: 5.5,
        150: 7.0,
    }


def test_a_spread_that_seeds_have_makes_the_band() -> None:
    """Relative variances 0.01 and 0.03 at steps 50 and 100, which is 0.02 for both; the one of step 0 says nothing."""
    wide = 0.3**0.5
    curves = [{0: 8.0, 50: 20.0 + sign * 2, 100: 10 + sign * wide * 10**0.5} for sign in (-1, 0, 1)]
    half = 3.0 * math.sqrt(0.02 * 4 / 3) + TOLERANCE
    expected = {step: (mean * (1 - half), mean * (1 + half)) for step, mean in ((0, 8.0), (50, 20.0), (100, 10.0))}
    found = bands(curves, t_quantile=3.0)
    assert found.keys() == expected.keys()
    for step, band in found.items():
        assert tuple(band) == pytest.approx(expected[step])


def test_seeds_that_all_agree_leave_the_tolerance() -> None:
    assert bands([{0: 8.0, 50: 20.0}] * 2, t_quantile=3.0)[50] == pytest.approx((20 - 0.8, 20 + 0.8))


MADE_UP = {
    "seeds": [1, 2],
    "torch": "2.13.0",
    "python": "3.11.7",
    "t_quantile": 3.0,
    "curves": [
        {"split": "held-out", "part": "qk", "steps": [0, 50, 150], "losses": [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]},
        {"split": "training", "part": "qk", "steps": [25, 50], "losses": [[2.0, 4.0], [1.0, 5.0]]},
    ],
}
HISTORY: list[dict[str, Any]] = [
    {"step": 0, "eval_qk": 2.0},
    {"step": 25, "qk": 2.0},
    {"step": 50, "qk": 3.0},
    {"step": 50, "eval_qk": math.nan},
    {"step": 150, "eval_qk": 9.0},
]


def test_losses_are_compared_up_to_the_steps_of_a_check() -> None:
    readings = compare(HISTORY, MADE_UP)
    assert [(reading.split, reading.step, reading.inside) for reading in readings] == [
        ("held-out", 0, True),
        ("held-out", 50, False),  # NaN
        ("training", 50, False),
    ]
    assert readings[2].measured == 2.5
    assert readings[2].band == pytest.approx((3 * (1 - TOLERANCE), 3 * (1 + TOLERANCE)))


def test_what_is_told_names_each_loss_and_their_number() -> None:
    readings = compare(HISTORY, MADE_UP)
    lines = tell(readings, MADE_UP).splitlines()
    assert re.fullmatch(r"qk held-out +0 +2\.0000  1\.\d+ to 2\.\d+  inside", lines[1])
    assert re.fullmatch(r"qk training +1-50 +2\.5000  2\.\d+ to 3\.\d+  OUTSIDE", lines[3])
    made = "the band of the reference run: 2 seeds, torch 2.13.0, Python 3.11.7."
    assert lines[-1] == f"2 of 3 losses lie outside {made}"
    assert tell(readings[:1], MADE_UP).splitlines()[-1] == f"All 1 losses lie in {made}"


def test_the_shipped_reference_is_of_the_whole_demonstration() -> None:
    found = {(curve["split"], curve["part"]): curve["steps"] for curve in SHIPPED["curves"]}
    last = DEMO["max_steps"]
    assert found == {
        **{("held-out", part): list(range(0, last + 1, DEMO["eval_steps"])) for part in ("qk", "vv")},
        **{("training", part): list(range(10, last + 1, DEMO["logging_steps"])) for part in ("qk", "vv")},
    }
    assert DEMO["eval_steps"] == WINDOW == MEGA_BATCH
    assert STEPS % WINDOW == 0
    assert TrainingArguments("unused").seed not in SHIPPED["seeds"]  # the check's own is a new one
    seeds = len(SHIPPED["seeds"])
    for curve in SHIPPED["curves"]:
        assert [len(losses) for losses in curve["losses"]] == [len(curve["steps"])] * seeds
    quantile = student_t.ppf((1 + reference_run.CONFIDENCE) / 2, (seeds - 1) * last / WINDOW)
    assert SHIPPED["t_quantile"] == pytest.approx(quantile, abs=1e-3)


def test_the_readme_shows_what_the_command_prints() -> None:
    block = re.search(r"```\n(loss +steps +measured.*?)\n```", README, flags=re.DOTALL)
    assert block is not None
    measured = re.findall(r"^(\w+) (held-out|training) +(?:\d+-)?(\d+) +([\d.]+)", block[1], flags=re.MULTILINE)
    history = [{"step": int(step), PREFIXES[split] + part: float(value)} for part, split, step, value in measured]
    assert tell(compare(history, SHIPPED), SHIPPED) == block[1]
    for curve in SHIPPED["curves"]:
        ends = [losses[-1] for losses in curve["losses"]]
        told = f"{curve['part']} {statistics.mean(ends):.4f} ± {statistics.stdev(ends):.4f}"
        assert (told in README) == (curve["split"] == "held-out")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rate", "5e-4"], "learning_rate"),  # the Trainer's, and not the demonstration's
        (["--teacher", "bert-base-uncased"], "teacher"),
        (["--recipe", "minilm-v2-l6-h384"], "teacher"),
        (["--bf16", "--max-steps=100"], "max_steps"),
        (["--dry_run"], "dry_run"),
    ],
)
def test_another_run_than_the_demonstration_is_refused(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--check", *flags])
    sentence = f"--{named} is given with --check, which is a run of the demonstration as it stands"
    assert capsys.readouterr().err == f"minilm-train: error: {sentence}: leave one of them out\n"


def test_how_it_is_computed_may_be_said() -> None:
    arguments = parse(["--check", "--use_cpu", "--bf16", "--implementation", "reference", "--seed=7"])
    assert arguments.demo
    assert (arguments.training.bf16, arguments.training.seed, arguments.training.max_steps) == (True, 7, 300)


def test_several_processes_are_refused(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    code, _, err = command("--check", "--use_cpu")
    assert (code, err) == (
        2,
        "minilm-train: error: --check is a run of one process, and 2 were started: their batches are larger\n",
    )


def test_a_check_takes_the_first_steps_of_the_schedule_and_leaves_nothing(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four steps in place of a hundred, on short texts; judged by made-up references, by the second as outside."""
    texts = demo.docstrings()[:200]
    monkeypatch.setattr("minilm.cli.inputs.docstrings", lambda: texts)
    short = {"max_length": 16, "eval_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    for name, value in short.items():
        monkeypatch.setitem(DEMO, name, value)
    monkeypatch.setattr(check, "STEPS", 4)
    monkeypatch.setattr(check, "WINDOW", 2)
    monkeypatch.setattr(check, "REFERENCE", tmp_path / "reference.json")
    (tmp_path / "minilm-demo").mkdir()
    (tmp_path / "minilm-demo" / "metrics.json").write_text("{}")  # a demonstration that is finished
    rates: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            rates.extend(logs["learning_rate"] for _ in range("learning_rate" in logs))

    make = check.prepare

    def prepare(arguments: Any) -> Any:
        run = make(arguments)
        run.trainer.add_callback(Watch())
        return run

    monkeypatch.setattr(check, "prepare", prepare)
    for low, high, expected in ((0.01, 10.0, 0), (5.0, 6.0, 1)):
        curves = [
            {"split": split, "part": part, "steps": steps, "losses": [[loss] * len(steps) for loss in (low, high)]}
            for split, steps in (("held-out", [0, 2, 4, 6]), ("training", [1, 2, 3, 4, 5, 6]))
            for part in ("qk", "vv")
        ]
        (tmp_path / "reference.json").write_text(json.dumps(MADE_UP | {"t_quantile": 1.0, "curves": curves}))
        code, out, _ = command("--check", "--use_cpu", "--disable_tqdm", "true")
        assert code == expected
        told = out.splitlines()
        assert "folder     none, the student is not kept" in told
        assert [line.split()[-1] for line in told[-12:-2]] == [["inside", "OUTSIDE"][expected]] * 10
        assert told[-1].startswith(("All 10 losses lie in", "10 of 10 losses lie outside")[expected])
    warmup = DEMO["warmup_steps"]
    assert rates == pytest.approx([step / warmup * DEMO["learning_rate"] for step in range(4)] * 2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.json", "minilm-demo", "reference.json"]


def made_run(output: Path, seed: int) -> None:
    """What the demonstration leaves under a seed, as far as it is read."""
    (output / "checkpoint-300").mkdir(parents=True)
    history = [
        {"step": 0, "eval_qk": 8.0, "eval_vv": 4.0},
        {"step": 10, "qk": 7.0 + seed / 10, "vv": 3.0},
        {"step": 300, "eval_qk": 1.0 + seed, "eval_vv": 1 / 3},
    ]
    (output / "checkpoint-300" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    metrics = {
        "device": "cpu",
        "steps": 300,
        "parts": {"qk": 1.0, "vv": 1.0},
        "data": {"train_sequences": 90, "heldout_sequences": 10},
        "agreement": {when: {"correlation": 0.1 * seed, "neighbours": 0.5} for when in ("start", "end")},
    }
    (output / "metrics.json").write_text(json.dumps(metrics))


def test_the_reference_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(tmp_path / "seed-1", 1)
    started: list[str] = []

    def run(argv: list[str]) -> Any:
        flags = dict(zip(argv[3::2], argv[4::2], strict=True))
        assert flags["--resume_from_checkpoint"] == "auto"
        started.append(flags["--seed"])
        if len(started) == 1:
            return subprocess.CompletedProcess(argv, 143)
        made_run(Path(flags["--output_dir"]), int(flags["--seed"]))
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(reference_run.subprocess, "run", run)
    out = tmp_path / "reference.json"
    argv = ["--seeds", "3", "--work", str(tmp_path), "--out", str(out), "--commit", "abc"]
    assert reference_run.main(argv) == 143
    assert not out.exists()
    assert reference_run.main(argv) == 0
    assert started == ["2", "2", "3"]

    made = json.loads(out.read_text())
    assert made["command"] == "python bench/reference_run.py --seeds 3"
    assert (made["commit"], made["seeds"]) == ("abc", [1, 2, 3])
    assert made["t_quantile"] == pytest.approx(4.318, abs=1e-3)  # a table's: 99.9 %, 12 degrees of freedom
    assert made["sequences"] == {"training": 90, "held-out": 10}
    assert made["agreement"]["end correlation"] == [0.1, 0.2, 0.3]
    assert made["curves"] == [
        {"split": "held-out", "part": "qk", "steps": [0, 300], "losses": [[8.0, 2.0], [8.0, 3.0], [8.0, 4.0]]},
        {"split": "held-out", "part": "vv", "steps": [0, 300], "losses": [[4.0, 0.33333]] * 3},
        {"split": "training", "part": "qk", "steps": [10], "losses": [[7.1], [7.2], [7.3]]},
        {"split": "training", "part": "vv", "steps": [10], "losses": [[3.0]] * 3},
    ]


def test_one_seed_has_no_spread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        reference_run.main(["--seeds", "1"])
    assert capsys.readouterr().err.endswith("error: --seeds is 1: a spread needs at least 2\n")
