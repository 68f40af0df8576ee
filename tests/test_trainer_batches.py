"""The Trainer on flattened texts and on sounds: the loss is that of the sequences alone, or it says why it is not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import NO_DROPOUT, sequences, trainer
from tiny_models import tiny_encoder, tiny_model
from tiny_text import tiny_tokenizer
from torch import Tensor
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding, PreTrainedModel, TrainingArguments

from minilm import MiniLMLoss
from minilm.models.students import build_student
from minilm.training.trainer import DistillationTrainer

CAUSAL = {"llama": True, "gpt2": True, "bert": False}


def stepped(run: DistillationTrainer) -> tuple[dict[str, Tensor], float]:
    """The student after a step, and its held-out loss after that."""
    run.train()
    return run.student.state_dict(), run.evaluate(sequences())["eval_loss"]


@pytest.mark.parametrize(
    "told_by", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}, {"return_position_ids": False}]
)
@pytest.mark.parametrize("family", CAUSAL)
def test_a_flattened_step_is_the_padded_step(tmp_path: Path, family: str, told_by: dict[str, Any]) -> None:
    """Also where the model itself would not keep the sequences apart, and in evaluation."""
    if told_by == {"return_position_ids": False}:
        told_by = {**told_by, "return_seq_idx": True}
    no_dropout = {"bert": NO_DROPOUT, "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)}
    options = {
        "teacher": tiny_model(family, **no_dropout.get(family, {})),
        "criterion": MiniLMLoss(("qk", "vv"), causal=CAUSAL[family]),
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
    }
    expected, loss = stepped(trainer(tmp_path, **options))
    flat = trainer(tmp_path, **options)
    flat.data_collator = DataCollatorWithFlattening(**told_by)
    actual, flat_loss = stepped(flat)
    assert flat_loss == pytest.approx(loss, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_output_loss_of_flattened_texts_is_that_of_padded_ones(tmp_path: Path) -> None:
    teacher = tiny_model("llama", "ForCausalLM")
    losses = []
    for collator in (None, DataCollatorWithFlattening()):
        run = DistillationTrainer(
            teacher=teacher,
            student=build_student(teacher, num_layers=2, init="random", seed=3, with_head=True),
            criterion=MiniLMLoss({"qk": 1.0}, causal=True),
            args=trainer(tmp_path).args,
            train_dataset=sequences(),
            eval_dataset=sequences(),
            data_collator=collator or DataCollatorWithPadding(tiny_tokenizer()),
            output_weight=1.0,
        )
        losses.append(run.evaluate())
    for part in ("loss", "qk", "output"):
        assert losses[1][f"eval_{part}"] == pytest.approx(losses[0][f"eval_{part}"], rel=1e-5)


def test_flattened_texts_are_not_evaluated_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate would fill the last batch up with texts that it cannot take off again."""
    run = trainer(tmp_path, teacher=tiny_model("llama"), criterion=MiniLMLoss(causal=True))
    flat = DataCollatorWithFlattening()([{"input_ids": row["input_ids"]} for row in sequences()])
    assert run.prediction_step(run.model, dict(flat), True)[0] > 0
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="flattened texts cannot be shared out evenly to 2 processes"):
        run.prediction_step(run.model, dict(flat), True)


@pytest.mark.parametrize(
    ("teacher", "criterion", "options", "message"),
    [
        (tiny_model("mobilebert"), MiniLMLoss(), {}, "MobileBertModel does not keep packed sequences apart"),
        (
            tiny_model("llama"),
            MiniLMLoss(),
            {},
            "the loss is causal=False and LlamaModel does not see tokens ahead: .* MiniLMLoss causal=True",
        ),
        (
            tiny_model("bert", "ForSequenceClassification"),
            MiniLMLoss(),
            {"output_weight": 1.0},
            "BertForSequenceClassification classifies whole rows",
        ),
    ],
)
def test_flattened_batches_that_cannot_be_right_are_refused(
    tmp_path: Path, teacher: PreTrainedModel, criterion: MiniLMLoss, options: dict[str, Any], message: str
) -> None:
    run = DistillationTrainer(
        teacher=teacher,
        student=build_student(teacher, num_layers=2, with_head=bool(options)),
        criterion=criterion,
        args=trainer(tmp_path).args,
        train_dataset=sequences(),
        data_collator=DataCollatorWithFlattening(),
        **options,
    )
    with pytest.raises(ValueError, match=message):
        run.train()


def sounds(length: int) -> dict[str, Tensor]:
    values = torch.randn(1, length, generator=torch.Generator().manual_seed(0))
    return {"input_values": values, "attention_mask": torch.ones(1, length, dtype=torch.long)}


def test_padding_of_sounds_weighs_nothing(tmp_path: Path) -> None:
    """Masks count samples, the relations tokens; the model with a layer norm in its convolutions takes the mask."""
    teacher = tiny_encoder("wav2vec2", feat_extract_norm="layer", do_stable_layer_norm=True)
    run = trainer(tmp_path, teacher=teacher, criterion=MiniLMLoss(), train_dataset=[{}], remove_unused_columns=False)

    def loss(batch: dict[str, Tensor]) -> float:
        return run.compute_loss(run.model.eval(), batch).item()

    alone = sounds(120)
    padded = {name: torch.nn.functional.pad(tensor, (0, 80)) for name, tensor in alone.items()}
    assert loss(padded) == pytest.approx(loss(alone), rel=1e-4)


def test_a_mask_that_a_model_of_sounds_does_not_use_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=tiny_encoder("whisper"), train_dataset=[{}], remove_unused_columns=False)
    batch = {"input_features": torch.randn(2, 8, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    with pytest.raises(
        ValueError,
        match=r"attention_mask is \(2, 20\), and WhisperEncoder makes 10 tokens of .*: leave out the mask",
    ):
        run.compute_loss(run.model, batch)
