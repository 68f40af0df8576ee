"""Every kind of run trains, logs, is stopped by a signal, goes on, and leaves a student that loads."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from PIL import Image
from processes import IMPORTED
from resuming import each_trainer_with
from tiny_models import tiny_inputs, tiny_model
from tiny_text import save_teacher, tiny_tokenizer, write_lines
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
    ViTImageProcessor,
)

STEPS = [
    *("--student_num_layers", "2", "--max_steps", "6", "--per_device_train_batch_size", "4", "--logging_steps", "2"),
    *("--disable_tqdm", "true", "--use_cpu", "--save_steps", "4", "--learning_rate", "1e-2"),
]


def with_head(folder: Path, head: str, **config: Any) -> Path:
    tiny_model("bert", head, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def images(folder: Path) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(24):
        Image.fromarray(draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def vit(folder: Path) -> Path:
    tiny_model("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


TEXT = ["--max_length", "24"]
KINDS = {
    "v1": (save_teacher, TEXT),
    "v2": (save_teacher, [*TEXT, "--objective", "minilm-v2", "--student_hidden_size", "16"]),
    "pca": (save_teacher, [*TEXT, "--objective", "minilm-v2", "--student_hidden_size", "16", "--student_init", "pca"]),
    "packed": (save_teacher, [*TEXT, "--packing"]),
    "stream": (save_teacher, [*TEXT, "--streaming", "--shuffle_buffer", "8"]),
    "decoder": (lambda folder: save_teacher(folder, "llama"), [*TEXT, "--packing", "--student_init", "random"]),
    "masked LM": (lambda folder: with_head(folder, "ForMaskedLM"), [*TEXT, "--output_weight", "0.5"]),
    "masked words": (
        lambda folder: with_head(folder, "ForMaskedLM"),
        [*TEXT, "--objective", "distilbert", "--packing", "--streaming", "--shuffle_buffer", "8"],
    ),
    "classifier": (
        lambda folder: with_head(folder, "ForSequenceClassification", num_labels=3),
        [*TEXT, "--output_weight", "0.5", "--output_temperature", "2"],
    ),
    "vision": (vit, ["--student_init", "random"]),
}


class Stop(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_stops_goes_on_and_loads(
    tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make, flags = KINDS[kind]
    teacher = make(tmp_path / "teacher")
    data = images(tmp_path / "images") if kind == "vision" else write_lines(tmp_path / "lines.txt", 60)
    argv = ["--teacher", str(teacher), "--data", str(data), "--output_dir", "out", *STEPS, *flags]

    with each_trainer_with(Stop, monkeypatch):
        code, _, err = command(*argv)
    assert (code, err.count("\n")) == (128 + signal.SIGTERM, 1)
    assert "stopped by SIGTERM after a checkpoint was saved; --resume_from_checkpoint auto continues" in err
    assert [path.name for path in Path("out").iterdir()] == ["checkpoint-3"]

    code, out, err = command(*argv, "--resume_from_checkpoint", "auto")
    assert (code, err) == (0, "")
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert (metrics["steps"], metrics["steps_before_resuming"]) == (6, 3)
    assert all(ends["start"] != ends["end"] for ends in metrics["heldout"].values())
    log = json.loads(Path("out/checkpoint-6/trainer_state.json").read_text())["log_history"]
    logged = [row for row in log if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert all(np.isfinite(row[part]) for row in logged for part in metrics["heldout"])
    unit = "images" if kind == "vision" else "tokens"
    assert all(row[f"{unit}_per_second"] > 0 for row in logged)
    assert metrics["training"].keys() == {f"{unit}_per_second"}
    assert ("output" in metrics["heldout"]) == (kind in ("masked LM", "masked words", "classifier"))

    student = AutoModel.from_pretrained("out")
    assert student.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.isfinite(student(**tiny_inputs(student)).last_hidden_state).all()
    if "output" in metrics["heldout"]:
        auto = AutoModelForMaskedLM if "masked" in kind else AutoModelForSequenceClassification
        _, info = auto.from_pretrained("out", output_loading_info=True)
        assert not info["missing_keys"]
        assert f"student = {auto.__name__}.from_pretrained('out')" in out
        assert "LOAD REPORT" not in out
    assert Path("out/report.md").read_text() in out


@pytest.fixture
def not_forked() -> Iterator[None]:
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    yield
    multiprocessing.set_start_method(None, force=True)


@pytest.mark.usefixtures("not_forked")
@pytest.mark.parametrize("kind", ["v1", "packed", "stream", "masked words", "vision"])
def test_the_loaders_workers_need_not_be_forked(tmp_path: Path, command: CommandLine, kind: str) -> None:
    """As they are not on macOS, nor from Python 3.14 on: what they are given must be picklable."""
    make, flags = KINDS[kind]
    data = images(tmp_path / "images") if kind == "vision" else write_lines(tmp_path / "lines.txt", 60)
    argv = ["--teacher", str(make(tmp_path / "teacher")), "--data", str(data), "--output_dir", "out", *STEPS, *flags]
    code, _, err = command(*argv, "--dataloader_num_workers", "1", "--max_steps", "2")
    assert (code, err) == (0, "")
