"""The Trainer with an output loss, with packed rows and with images; what it tells of its pace, and its sampler."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import DEFAULTS, NO_DROPOUT, sequences, trainer
from tiny_models import tiny_inputs, tiny_model
from tiny_text import tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, PreTrainedModel, TrainingArguments

from minilm import MiniLMLoss, attention_qkv, fused_minilm_loss
from minilm.data.packing import PackingCollator, pack
from minilm.models.batches import model_inputs
from minilm.models.probes import is_causal
from minilm.models.students import build_student
from minilm.training.model import DistillationModel
from minilm.training.trainer import DistillationTrainer

T = 2.0


def output_trainer(folder: Path, head: str, family: str = "bert", **options: Any) -> DistillationTrainer:
    config = NO_DROPOUT if family == "bert" else {}
    teacher = tiny_model(family, head, **config)
    return DistillationTrainer(
        teacher=teacher,
        student=build_student(teacher, num_layers=2, init="random", seed=3, with_head=True),
        criterion=MiniLMLoss({"qk": 1.0}, causal=is_causal(teacher)),
        output_weight=0.25,
        output_temperature=T,
        args=TrainingArguments(str(folder), **{**DEFAULTS, **options}),
        train_dataset=sequences(empty=2),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
    )


def expected_step(run: DistillationTrainer, student: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Σ relations / sequences and Σ T² KL(logits) / tokens, from each sequence alone."""
    relations, outputs, count = [], [], 0
    for row in sequences():
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        causal = is_causal(run.teacher)
        qkv = attention_qkv(run.teacher, inputs), attention_qkv(student, inputs)
        relations.append(fused_minilm_loss(*qkv, ["qk"], causal=causal, implementation="reference"))
        p = (run.teacher(**inputs).logits.double() / T).log_softmax(-1).detach()
        q = (student(**inputs).logits.double() / T).log_softmax(-1)
        outputs.append(T**2 * F.kl_div(q, p, log_target=True, reduction="sum"))
        count += len(row["input_ids"])
    return torch.stack(relations).mean(), torch.stack(outputs).sum() / count


@pytest.mark.parametrize(("family", "head"), [("bert", "ForMaskedLM"), ("llama", "ForCausalLM")])
@pytest.mark.parametrize(("batch", "accumulation"), [(9, 1), (2, 5)])
def test_the_output_loss_is_the_mean_over_the_tokens_of_a_step(
    tmp_path: Path, family: str, head: str, batch: int, accumulation: int
) -> None:
    run = output_trainer(
        tmp_path, head, family, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    student = copy.deepcopy(run.student).eval()
    run.train()
    relation, output = expected_step(run, student)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert any("head" in name or "cls" in name for name in [*parameters, *student.state_dict()])
    gradients = torch.autograd.grad(relation + 0.25 * output, list(parameters.values()))
    trained = dict(run.student.named_parameters())
    for (name, start), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(trained[name], start - gradient, rtol=1e-4, atol=1e-5, msg=name)
    logged = run.state.log_history[0]
    assert logged["output"] == pytest.approx(output.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(logged["qk"] + 0.25 * logged["output"], rel=1e-5)


def test_a_classifiers_output_loss_is_the_mean_over_examples(tmp_path: Path) -> None:
    teacher = tiny_model("bert", "ForSequenceClassification", num_labels=3, **NO_DROPOUT)
    student = build_student(teacher, num_layers=2, init="random", seed=3, with_head=True)
    run = DistillationTrainer(
        teacher=teacher,
        student=student,
        criterion=MiniLMLoss({"qk": 1.0}),
        output_weight=1.0,
        args=TrainingArguments(
            str(tmp_path), **{**DEFAULTS, "per_device_train_batch_size": 3}, gradient_accumulation_steps=3
        ),
        train_dataset=sequences(),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
    )
    before = copy.deepcopy(run.student).eval()
    run.train()
    outputs = []
    for row in sequences():
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        p, q = (model(**inputs).logits.log_softmax(-1) for model in (run.teacher, before))
        outputs.append(F.kl_div(q, p, log_target=True, reduction="sum"))
    assert run.state.log_history[0]["output"] == pytest.approx(torch.stack(outputs).mean().item(), rel=1e-4)


def test_a_packed_step_is_the_unpadded_step(tmp_path: Path) -> None:
    """The same sequences in three rows and in seven, two and three micro-batches: the same weights afterwards."""
    data, students = sequences(), []
    packed = pack(data, 24)
    assert len(packed) == 2
    for train_dataset, collator in ((data, None), (packed, PackingCollator(0, 24))):
        run = trainer(
            tmp_path,
            teacher=tiny_model("bert", **NO_DROPOUT),
            train_dataset=train_dataset,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=7 if collator is None else 2,
        )
        run.data_collator = collator or run.data_collator
        run.train()
        students.append(run.student.state_dict())
        assert run.state.global_step == 1
    start = trainer(tmp_path, teacher=tiny_model("bert", **NO_DROPOUT)).student.state_dict()
    moved = max(float((students[0][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_images_train(tmp_path: Path) -> None:
    teacher = tiny_model("vit")
    pixels = tiny_inputs(teacher, (1,) * 6)["pixel_values"]
    data: Any = [{"pixel_values": image} for image in pixels]
    run = DistillationTrainer(
        teacher=teacher,
        student=build_student(teacher, num_layers=2, init="random", seed=3),
        criterion=MiniLMLoss(),
        args=TrainingArguments(
            str(tmp_path), **{**DEFAULTS, "max_steps": 4, "learning_rate": 0.5, "per_device_train_batch_size": 3}
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    assert run.state.log_history[-1]["eval_qk"] > 0


def test_evaluation_weighs_the_output_loss_by_tokens(tmp_path: Path) -> None:
    run = output_trainer(tmp_path, "ForMaskedLM", per_device_eval_batch_size=2)
    metrics = run.evaluate(sequences(empty=1))
    relation, output = expected_step(run, run.student.eval())
    assert metrics["eval_output"] == pytest.approx(output.item(), rel=1e-4)
    assert metrics["eval_qk"] == pytest.approx(relation.item(), rel=1e-4)


def test_the_log_tells_tokens_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(module: Any, args: Any, output: Any) -> None:
        now[0] += 4.0

    evaluations = {"eval_strategy": "steps", "eval_steps": 1}  # which do not count
    run = trainer(tmp_path, own={"eval_dataset": sequences()}, max_steps=2, logging_steps=2, **evaluations)
    run.model.student.embeddings.register_forward_hook(slow)
    run.train()
    logged = next(row for row in run.state.log_history if "loss" in row)
    tokens = sum(len(row["input_ids"]) for row in sequences())
    assert logged["tokens_per_second"] == pytest.approx(tokens / 4, abs=0.06)


def test_the_order_of_the_data_is_the_seeds_and_the_epochs_alone(tmp_path: Path) -> None:
    def orders(**options: Any) -> list[list[int]]:
        sampler = trainer(tmp_path, **options)._get_train_sampler()
        drawn = []
        for epoch in (0, 1):
            torch.manual_seed(epoch)  # without effect
            sampler.set_epoch(epoch)
            drawn.append(list(sampler))
        return drawn

    assert orders(seed=5) == orders(seed=5)
    assert orders(seed=5) != orders(seed=6)
    assert orders(seed=6, data_seed=5) == orders(seed=5)
    grouped = orders(train_sampling_strategy="group_by_length", per_device_train_batch_size=2)
    assert all(sorted(order) == list(range(7)) for order in grouped)
    assert grouped != orders(per_device_train_batch_size=2)


def test_prefixes_in_the_data_reach_both_models_and_the_loss(tmp_path: Path) -> None:
    data = sequences()
    prefixed = data.add_column("prefix_lengths", [3, 4, 1, 2, 6, 0, 5])
    losses = []
    for train_dataset in (prefixed, data):
        run = trainer(
            tmp_path,
            teacher=tiny_model("llama"),
            criterion=MiniLMLoss(causal=True),
            train_dataset=train_dataset,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=3,
        )
        student = copy.deepcopy(run.student).eval()
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    expected = []
    for row in prefixed:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "prefix_lengths")}
        qkv = [attention_qkv(model, model_inputs(model, batch, True)) for model in (run.teacher, student)]
        prefix = batch["prefix_lengths"]
        expected.append(fused_minilm_loss(*qkv, causal=True, prefix_lengths=prefix, implementation="reference"))
    assert losses[0] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_pushing_keeps_the_reports_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("ours")
    trainer(tmp_path).create_model_card(model_name="student")
    assert (tmp_path / "README.md").read_text() == "ours"


def test_other_reductions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reduction must be 'sequence', not 'token'"):
        trainer(tmp_path, criterion=MiniLMLoss(reduction="token"))


def test_the_evaluations_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    run = output_trainer(tmp_path, "ForMaskedLM", per_device_eval_batch_size=2)
    metrics = run.evaluate(sequences())
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_qk"] + 0.25 * metrics["eval_output"], rel=1e-6)


def test_a_resumed_end_gives_the_best_model_and_takes_no_step(tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = {**every, "load_best_model_at_end": True, "learning_rate": 300.0, "own": {"eval_dataset": sequences()}}
    run = trainer(tmp_path / "best", max_steps=3, **options)
    run.train()
    best = run.evaluate()["eval_loss"]
    again = trainer(tmp_path / "best", max_steps=3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "best" / "checkpoint-3"))
    assert again.evaluate()["eval_loss"] == pytest.approx(best)

    epochs = {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    run = trainer(tmp_path / "epochs", save_steps=6, **epochs)
    run.train()
    assert run.state.global_step == 6
    again = trainer(tmp_path / "epochs", save_steps=6, **epochs)
    again.train(resume_from_checkpoint=str(tmp_path / "epochs" / "checkpoint-6"))
    assert again.state.global_step == 6


def test_a_temperature_out_of_range_is_told_before_training() -> None:
    teacher = tiny_model("bert", "ForMaskedLM")
    with pytest.raises(ValueError, match=r"temperature is 1e\+300: it must lie between"):
        DistillationModel(teacher, MiniLMLoss(), 1.0, 1e300)


def test_the_tokenizer_is_saved_as_it_was_given(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    run.processing_class.save_pretrained(tmp_path / "given")
    run.train()
    tokenizer: Any = run.processing_class
    tokenizer("ab cd", truncation=True, max_length=3, padding="max_length")
    run.save_model(str(tmp_path / "saved"))
    for file in (tmp_path / "given").iterdir():
        assert file.read_bytes() == (tmp_path / "saved" / file.name).read_bytes()
