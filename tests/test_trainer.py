"""The Trainer: a step is the mean over its sequences, and what it logs, evaluates, saves, resumes and refuses."""

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from one_step import NO_DROPOUT, sequences, trainer
from tiny_models import tiny_inputs, tiny_model
from tiny_text import tiny_tokenizer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from minilm import MiniLMLoss, fused_minilm_loss
from minilm.models.capture import attention_qkv
from minilm.models.observe import observe
from minilm.models.students import build_student, freeze_unused
from minilm.training.arguments import check_arguments
from minilm.training.model import DistillationModel

SMALL_BATCH = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
# Renamed within transformers 5; the old name warns where there is the new one.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float = 0, atol: float = 0) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def each_alone(
    teacher: PreTrainedModel, student: PreTrainedModel, data: datasets.Dataset, relation: str
) -> list[Tensor]:
    """A relation's loss of every sequence that has tokens, one at a time and without padding."""
    losses = []
    for row in data:
        if any(row["attention_mask"]):
            inputs = {"input_ids": torch.tensor([row["input_ids"]])}
            qkv = attention_qkv(teacher, inputs), attention_qkv(student, inputs)
            losses.append(fused_minilm_loss(*qkv, relations=[relation], implementation="reference"))
    return losses


def test_the_model_is_the_student_with_its_loss() -> None:
    teacher, criterion = tiny_model("bert"), MiniLMLoss({"qk": 1.0, "vv": 0.5})
    student = build_student(teacher, num_layers=2, init="random", seed=3).eval()
    inputs = tiny_inputs(teacher)
    teacher_qkv = attention_qkv(teacher, inputs)
    model = DistillationModel(student, criterion)
    outputs = model(observe(teacher, inputs, model.objective.teacher), **inputs)
    for relation in ("qk", "vv"):
        expected = fused_minilm_loss(
            teacher_qkv, attention_qkv(student, inputs), [relation], attention_mask=inputs["attention_mask"]
        )
        torch.testing.assert_close(outputs[relation], expected.detach())
        assert not outputs[relation].requires_grad
    torch.testing.assert_close(outputs["loss"], outputs["qk"] + 0.5 * outputs["vv"])
    assert outputs["loss"].requires_grad


@pytest.mark.parametrize(("batch", "accumulation"), [(9, 1), (2, 5), (4, 3)])
def test_a_step_is_the_mean_over_its_sequences(tmp_path: Path, batch: int, accumulation: int) -> None:
    """Two of the nine sequences are empty; the last micro-batch is smaller than the others."""
    data = sequences(empty=2)
    run = trainer(
        tmp_path,
        teacher=tiny_model("bert", **NO_DROPOUT),
        train_dataset=data,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    student = copy.deepcopy(run.student).eval()
    run.train()

    relations = {name: torch.stack(each_alone(run.teacher, student, data, name)).mean() for name in ("qk", "vv")}
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(sum(relations.values()), list(trained.values()))
    expected = weights(student)
    for name, gradient in zip(trained, gradients, strict=True):
        expected[name] -= gradient
    assert_close(weights(run.student), expected, rtol=1e-4, atol=1e-5)

    logged = run.state.log_history[0]
    assert logged["loss"] == pytest.approx(sum(relations.values()).item(), rel=1e-4)
    for name, value in relations.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4)


def test_logged_relations_are_means_since_the_last_log_and_weigh_to_the_loss(tmp_path: Path) -> None:
    criterion = MiniLMLoss({"qk": 1.0, "vv": 0.5})
    run = trainer(tmp_path, criterion=criterion, max_steps=6, logging_steps=3, learning_rate=0.1, **SMALL_BATCH)
    seen = []
    run.model.register_forward_hook(lambda module, args, outputs: seen.append(outputs["vv"].item()))
    run.train()
    logged = [row for row in run.state.log_history if "loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert row["loss"] == pytest.approx(row["qk"] + 0.5 * row["vv"], rel=1e-5)
    # A step is one batch, in which its own sequences weigh all.
    assert [row["vv"] for row in logged] == pytest.approx([sum(seen[:3]) / 3, sum(seen[3:]) / 3], rel=1e-5)


def test_evaluation_is_the_mean_over_the_sequences(tmp_path: Path) -> None:
    data = sequences(empty=1)
    run = trainer(tmp_path, own={"eval_dataset": data}, **SMALL_BATCH)
    metrics = run.evaluate()
    for relation in ("qk", "vv"):
        expected = torch.stack(each_alone(run.teacher, run.student.eval(), data, relation)).mean().item()
        assert metrics[f"eval_{relation}"] == pytest.approx(expected, rel=1e-5)


def test_the_teacher_runs_as_it_is_and_no_further_than_its_layer(tmp_path: Path) -> None:
    teacher = tiny_model("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    before, above = weights(teacher), []
    teacher.encoder.layer[2].register_forward_hook(lambda *_: above.append("ran"))
    run = trainer(tmp_path, teacher=teacher, own={"teacher_layer": -2})
    assert run.teacher_layer == 3
    inputs = tiny_inputs(teacher)
    losses = [run.compute_loss(run.model.eval(), inputs).item() for _ in range(2)]
    assert losses[0] == losses[1]
    run.train()
    assert_close(weights(teacher), before)
    assert not above


def test_under_bf16_the_loss_gets_bf16_of_both_models_and_the_student_stays_float32(tmp_path: Path) -> None:
    seen = []

    class Spy(MiniLMLoss):
        def forward(self, teacher: Any, student: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(tensor.dtype for tensor in (*teacher, *student))
            return super().forward(teacher, student, *args, **kwargs)

    run = trainer(tmp_path, criterion=Spy(), bf16=True)
    run.train()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in run.student.parameters()} == {torch.float32}


def test_gradient_checkpointing_takes_the_same_step(tmp_path: Path) -> None:
    students = []
    for checkpointing in (False, True):
        run = trainer(tmp_path, **{CHECKPOINTING: checkpointing})
        run.train()
        assert (
            any(getattr(module, "gradient_checkpointing", False) for module in run.student.modules()) == checkpointing
        )
        students.append(weights(run.student))
    assert_close(students[1], students[0])


def test_what_is_saved_is_the_student_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    unused = freeze_unused(build_student(run.teacher, num_layers=2, init="random", seed=3))
    start = weights(run.student)
    run.train()
    run.save_model()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_close(weights(loaded), weights(run.student))
    changed = {name for name in start if not torch.equal(start[name], loaded.state_dict()[name])}
    assert changed
    assert not changed & set(unused)  # what no relation trains is as initialised
    assert AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"] == tiny_tokenizer()("abc")["input_ids"]
    assert "minilm" not in (tmp_path / "config.json").read_text()
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


class StopAt(TrainerCallback):
    """Saves and ends the training after a step, as if it had been interrupted there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    schedule = {"max_steps": 7, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    whole = trainer(tmp_path / "whole", **schedule, **SMALL_BATCH)
    whole.train()
    stopped = trainer(tmp_path / "stopped", own={"callbacks": [StopAt(4)]}, **schedule, **SMALL_BATCH)
    stopped.train()
    assert stopped.state.global_step == 4
    resumed = trainer(tmp_path / "stopped", **schedule, **SMALL_BATCH)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    assert_close(weights(resumed.student), weights(whole.student))
    logged = [[row["qk"] for row in run.state.log_history if "loss" in row] for run in (whole, resumed)]
    assert logged[0] == logged[1]


def test_a_run_that_was_stopped_after_its_last_step_is_not_trained_again(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4, **SMALL_BATCH)
    run.train()
    again = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4, **SMALL_BATCH)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4
    assert_close(weights(again.student), weights(run.student))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(
        tmp_path,
        own={"eval_dataset": sequences()},
        max_steps=3,
        learning_rate=300.0,
        load_best_model_at_end=True,
        **every,
    )
    run.train()
    losses = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    best = min(losses.values())
    assert losses[3] > best  # so steep a rate does not end at its best
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


class _NotInstalled(TrainerCallback):
    def __init__(self) -> None:
        raise RuntimeError("it needs wandb")


def test_arguments_that_mean_nothing_here_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, **options)

    fails("layer 5 does not exist: layers are 1 to 4", own={"teacher_layer": 5})
    fails("label_smoothing_factor=0.1 means nothing here", label_smoothing_factor=0.1)
    fails("neftune_noise_alpha=5.0 is not supported", neftune_noise_alpha=5.0)
    fails("eval_do_concat_batches=False is not supported", eval_do_concat_batches=False)
    fails("data_seed must not be negative, got -1", data_seed=-1)
    fails("num_train_epochs is 0.* and max_steps -1: no step to train", num_train_epochs=0, max_steps=-1)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", _NotInstalled)
    fails(r"report_to=\['wandb'\]: it needs wandb", report_to=["wandb"])
    fails("use_reentrant=True is not supported", **{CHECKPOINTING + "_kwargs": {"use_reentrant": True}})


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun without a GPU and without use_cpu."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.world_size == 1
    check_arguments(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but each would train alone: .* --use_cpu"):
        check_arguments(args)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process: .* --nproc_per_node 2"):
        trainer(tmp_path)
