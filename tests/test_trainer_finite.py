"""A run that goes to NaN or infinity ends at that step and keeps what was good; and lower losses are better."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from one_step import sequences, trainer
from transformers import AutoModel, TrainerCallback

from minilm.errors import NonFiniteError
from minilm.training.finite import FiniteWatch
from minilm.training.trainer import DistillationTrainer

NAN, INFINITY = float("nan"), float("inf")
STEPS = {"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 3}


class At(TrainerCallback):
    """Does something to the model at a moment of one step."""

    def __init__(self, moment: str, step: int, act: Any) -> None:
        self.step, self.act = step, act
        setattr(self, moment, self.run)

    def run(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                self.act(model)


def spoil(what: str, value: float) -> Any:
    def act(model: Any) -> None:
        weight = model.student.encoder.layer[0].attention.self.query.weight
        tensor = weight if what == "weight" else weight.grad
        tensor[0, 0] = value

    return act


@pytest.mark.parametrize(
    ("moment", "what", "value", "told"),
    [
        ("on_step_begin", "weight", NAN, r"the loss \(qk, vv\) is NaN or infinite at step 3"),
        ("on_pre_optimizer_step", "gradient", INFINITY, r"weights of the student are NaN or infinite at step 3"),
        ("on_optimizer_step", "weight", INFINITY, r"weights of the student are NaN or infinite at step 3"),
    ],
)
def test_the_step_is_told_and_the_last_good_checkpoint_kept(
    tmp_path: Path, moment: str, what: str, value: float, told: str
) -> None:
    good = 2
    run = trainer(
        tmp_path,
        own={"callbacks": [At(moment, good, spoil(what, value))]},
        **{**STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
    )
    with pytest.raises(NonFiniteError, match=rf"{told} .*the newest intact checkpoint is .*checkpoint-{good}$"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{good}"]
    saved = AutoModel.from_pretrained(tmp_path / f"checkpoint-{good}")
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


def test_gradients_that_are_no_numbers_end_the_run_while_losses_are_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, max_grad_norm=1.0, **STEPS)
    step = run.training_step

    def spoiled(model: Any, inputs: Any, *rest: Any) -> Any:
        loss = step(model, inputs, *rest)
        if run.state.global_step == 1:
            spoil("gradient", NAN)(model)
        return loss

    monkeypatch.setattr(run, "training_step", spoiled)
    with pytest.raises(
        NonFiniteError, match=r"^the norm of the gradients is NaN or infinite at step 2 \(learning_rate"
    ):
        run.train()


def test_a_scaler_passes_over_gradients_without_the_run_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under fp16 its search for a scale begins with some that overflow; their step is not taken."""
    run = trainer(tmp_path, max_grad_norm=1.0, **STEPS)
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(INFINITY))
    monkeypatch.setattr(run.accelerator, "scaler", torch.amp.GradScaler("cpu", enabled=False))
    run.train()
    assert run.state.global_step == 6


def test_where_reading_waits_for_the_device_it_is_done_at_logs_and_the_first_step_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, own={"callbacks": [At("on_step_begin", 1, spoil("weight", NAN))]}, **STEPS)
    monkeypatch.setattr(run, "_looks_at_every_step", False)
    reads = []
    first = FiniteWatch.first
    monkeypatch.setattr(FiniteWatch, "first", lambda *args: (reads.append(run.state.global_step), first(*args))[1])
    with pytest.raises(NonFiniteError, match=r"the loss \(qk, vv\) is NaN or infinite at step 2 "):
        run.train()
    assert reads == [3]


def test_heldout_losses_that_are_no_numbers_end_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, own={"eval_dataset": sequences()}, eval_on_start=True, **STEPS)
    with torch.no_grad():
        spoil("weight", NAN)(run.model)
    with pytest.raises(NonFiniteError, match=r"^held-out: the loss \(qk, vv\) is NaN or infinite at step 0 "):
        run.train()


def test_one_rank_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, **STEPS)
    other = torch.tensor([2**62, 2, 2**62, 2**62, 2**62])  # what it saw of qk, vv, the loss, gradients and weights
    monkeypatch.setattr(run.accelerator, "gather", lambda steps: torch.cat([steps, other]))
    with pytest.raises(NonFiniteError, match=r"the loss \(vv\) is NaN or infinite at step 2 "):
        run.train()


EVERY = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("metric", ["qk", "eval_vv", "loss"])
@pytest.mark.parametrize("greater", [False, True])
def test_lower_is_better_unless_the_trainer_is_told_otherwise(tmp_path: Path, metric: str, greater: bool) -> None:
    run = trainer(
        tmp_path,
        own={"eval_dataset": sequences(), **({"greater_is_better": True} if greater else {})},
        **{**STEPS, "max_steps": 4, "learning_rate": 1.0, "load_best_model_at_end": True},
        metric_for_best_model=metric,
        **EVERY,
    )
    run.train()
    losses = {
        row["step"]: row[f"eval_{metric.removeprefix('eval_')}"] for row in run.state.log_history if "eval_qk" in row
    }
    assert len(set(losses.values())) == len(losses) == 4
    best = max(losses, key=losses.__getitem__) if greater else min(losses, key=losses.__getitem__)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")


def test_metrics_that_no_evaluation_gives_are_refused(tmp_path: Path) -> None:
    def fails(match: str, *, own: dict[str, Any] | None = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, own={"eval_dataset": sequences(), **(own or {})}, **options)

    fails("is 'accuracy': it must be one of loss, qk, vv$", metric_for_best_model="accuracy")
    two = {"eval_dataset": {"a": sequences(), "b": sequences()}}
    fails("one of a_loss, a_qk, a_vv, b_loss, b_qk, b_vv$", own=two, metric_for_best_model="qk")
    trainer(tmp_path, own=two, metric_for_best_model="eval_b_qk")
    of_its_own = {"compute_metrics": lambda prediction: {"accuracy": 1.0}}
    trainer(tmp_path, own=of_its_own, metric_for_best_model="accuracy")
    fails("load_best_model_at_end needs eval_strategy 'steps' or 'epoch'", load_best_model_at_end=True)
    best = {"save_strategy": "best", "metric_for_best_model": "qk"}
    fails("save_strategy='best' needs eval_strategy 'steps' or 'epoch'", **best)


SMALL = [
    *("--student_num_layers", "2", "--max_steps", "4", "--per_device_train_batch_size", "4", "--max_length", "12"),
    *("--disable_tqdm", "true", "--use_cpu", "--report_to", "none", "--output_dir", "out", "--save_steps", "1"),
]


def test_the_command_stops_with_one_line_and_goes_on_from_the_good_checkpoint(
    command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--teacher", teacher, "--data", data, *SMALL]
    initialise = DistillationTrainer.__init__

    def spoiled(self: DistillationTrainer, **options: Any) -> None:
        initialise(self, **options)
        self.add_callback(At("on_step_begin", 2, spoil("weight", NAN)))

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "__init__", spoiled)
        code, _, err = command(*argv)
    assert (code, err.count("\n")) == (1, 1)
    assert "the loss (qk, vv) is NaN or infinite at step 3 (learning_rate is 0.0005): the run has ended there" in err
    assert "the newest intact checkpoint is out/checkpoint-2" in err
    assert not Path("out/model.safetensors").exists()
    assert command(*argv, "--resume_from_checkpoint", "auto")[0] == 0
    metrics = json.loads(Path("out/metrics.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert (metrics["steps"], metrics["steps_before_resuming"]) == (4, 2)


def test_too_steep_a_rate_leaves_no_student(command: CommandLine, teacher: str, data: str) -> None:
    code, _, err = command("--teacher", teacher, "--data", data, *SMALL, "--learning_rate", "1e9")
    assert (code, err.count("\n")) == (1, 1)
    assert "is NaN or infinite at step " in err
    assert not Path("out/model.safetensors").exists()


@pytest.mark.parametrize(("flags", "greater"), [([], False), (["--greater_is_better", "true"], True)])
def test_the_best_checkpoint_of_the_command(
    command: CommandLine, teacher: str, data: str, flags: list[str], greater: bool
) -> None:
    every = ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "--learning_rate", "1e-2"]
    best = ["--metric_for_best_model", "qk", "--save_total_limit", "0"]
    assert command("--teacher", teacher, "--data", data, *SMALL, *every, *best, *flags)[0] == 0
    state = json.loads(Path("out/checkpoint-4/trainer_state.json").read_text())
    losses = {row["step"]: row["eval_qk"] for row in state["log_history"] if row.get("eval_qk") and row["step"]}
    wanted = max(losses.values()) if greater else min(losses.values())
    assert state["best_metric"] == wanted
    assert json.loads(Path("out/metrics.json").read_text())["heldout"]["qk"]["end"] == pytest.approx(wanted)
    assert len(list(Path("out").glob("checkpoint-*"))) == 4
