"""What the arguments ask for is tried before work starts, and the trial leaves everything as it was."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from one_step import sequences, trainer
from torch import nn

from minilm.cli.trial import try_out
from minilm.errors import NonFiniteError, TrialError

SMALL = [
    *("--student_num_layers", "2", "--max_steps", "4", "--per_device_train_batch_size", "4", "--max_length", "12"),
    *("--disable_tqdm", "true", "--use_cpu", "--report_to", "none", "--output_dir", "out"),
]
SCHEDULE = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 2}
THREE_STEPS = {"max_steps": 3, "per_device_train_batch_size": 3, "optim": "adamw_torch", **SCHEDULE}


def random_states() -> list[Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = numpy_state
    return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]


def made(folder: Path, **options: Any) -> Any:
    return trainer(folder, own={"eval_dataset": sequences()}, **{**THREE_STEPS, **options})


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_run_after_the_trial_is_bitwise_the_run_without(tmp_path: Path, strategy: str) -> None:
    plain, tried = (made(tmp_path / name, train_sampling_strategy=strategy) for name in ("plain", "tried"))
    torch.manual_seed(1)
    plain.train()
    torch.manual_seed(1)
    before = random_states()
    weights = [parameter.clone() for parameter in tried.model.parameters()]
    try_out(tried)
    assert random_states() == before
    assert all(map(torch.equal, tried.model.parameters(), weights))
    assert all(parameter.grad is None for parameter in tried.model.parameters())
    assert "initial_lr" not in tried.optimizer.param_groups[0]  # no schedule has it yet
    tried.train()
    assert all(map(torch.equal, tried.model.parameters(), plain.model.parameters()))
    rates = [[row["learning_rate"] for row in run.state.log_history if "loss" in row] for run in (plain, tried)]
    assert rates[0] == rates[1]
    assert rates[0] == [0, 5e-4, 1e-3]


class Counting(nn.Module):
    """Counts its calls in a buffer, as normalisation keeps its running means."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


def test_buffers_and_the_mode_stay(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.student.encoder.layer[0].output = Counting(run.student.encoder.layer[0].output)
    run.model.eval()
    try_out(run)
    assert run.student.encoder.layer[0].output.calls == 0
    assert not run.model.training
    run.train()
    assert run.student.encoder.layer[0].output.calls > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optim_args": "zork"}, "cannot build the optimiser of --optim adamw_torch --optim_args zork: not enough val"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cannot build the schedule of --lr_scheduler_type cosine_with_m"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"x": 1}}, "{'x': 1}: TypeError: .* argument 'x'"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, "of --lr_scheduler_type polynomi"),
        ({"dataloader_persistent_workers": True}, "cannot make a batch of the held-out data: persistent_workers opti"),
        ({"torch_compile": True, "torch_compile_mode": "abc"}, "--torch_compile_mode abc: RuntimeError: Unrecognized"),
    ],
)
def test_what_is_built_late_is_tried(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(TrialError, match=told):
        try_out(made(tmp_path, **options))


def test_a_forward_that_fails_is_told_with_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise KeyError("first line\nsecond line")

    run = made(tmp_path)
    monkeypatch.setattr(run, "compute_loss", failing)
    with pytest.raises(TrialError, match=r"^cannot train on a batch of 3: KeyError: 'first line"):
        try_out(run)


def test_a_batch_that_does_not_fit_says_which_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = made(tmp_path)
    monkeypatch.setattr(run, "compute_loss", failing)
    with pytest.raises(TrialError, match=r"CUDA out of memory.; lower --per_device_train_batch_size"):
        try_out(run)
    run.args.auto_find_batch_size = True
    try_out(run)


def test_a_teacher_with_nan_is_noticed_before_training(tmp_path: Path) -> None:
    run = made(tmp_path)
    with torch.no_grad():
        run.teacher.encoder.layer[3].attention.self.query.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"before any training: qk nan, .*; there are such weights in the teacher"):
        try_out(run)


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--optim", "galore_adamw"], 2, "cannot build the optimiser of --optim galore_adamw: You need to install"),
        (["--dataloader_drop_last"], 2, "dataloader_drop_last drops all 2 held-out sequences: they make no batch of"),
        (["--metric_for_best_model", "accuracy"], 2, "is 'accuracy': it must be one of loss, qk, vv"),
        (["--torch_compile_backend", "abc"], 2, "'ABC' is not a valid DynamoBackend"),
        (["--accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 0}}'], 2, "at least 1, got 0"),
        (["--accelerator_config", '{"gradient_accumulation_kwargs": {"x": 0}}'], 2, "cannot build the trainer: TypeE"),
        (["--student_hidden_size", "4000000000"], 2, "cannot build the student: RuntimeError: "),
        (["--relations", "qk:1e38"], 1, "the first batch gives NaN or infinity before any training: gradient inf"),
    ],
)
def test_a_failed_trial_is_one_line_and_leaves_no_folder(
    command: CommandLine, teacher: str, data: str, flags: list[str], code: int, told: str
) -> None:
    ended, _, err = command("--teacher", teacher, "--data", data, *SMALL, *flags)
    *before, line = err.splitlines()
    assert (ended, [text for text in before if not text.startswith("[transformers]")]) == (code, [])
    assert told in line
    assert not Path("out").exists()


def test_a_folder_that_was_there_stays(command: CommandLine, teacher: str, data: str) -> None:
    Path("out").mkdir()
    code, _, _ = command("--teacher", teacher, "--data", data, *SMALL, "--optim_args", "zork")
    assert code == 2
    assert Path("out").is_dir()
