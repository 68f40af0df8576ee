"""Batches: packed sequences give the losses and gradients that they give apart, under every model; prefixes too."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from minilm import MiniLMLoss, attention_qkv, fused_minilm_loss
from minilm.batches import (
    check_packable,
    count_sequences,
    count_tokens,
    first_position,
    model_inputs,
    relation_mask,
    relation_qkv,
    token_mask,
)
from minilm.objectives import is_causal
from minilm.packing import PackingCollator
from minilm.students import build_student

FAMILIES = ["bert", "roberta", "distilbert", "electra", "modernbert", "llama", "qwen3", "gpt2"]
ROWS = [(5, 20, 7), (14,), (3, 16, 9)]  # lengths; some are longer than ModernBERT's window of 8


def documents() -> list[list[list[int]]]:
    draw = torch.Generator().manual_seed(2)
    return [[torch.randint(5, VOCABULARY, (n,), generator=draw).tolist() for n in row] for row in ROWS]


def packed_batch() -> dict[str, Tensor]:
    rows = [
        {"input_ids": [token for ids in row for token in ids], "lengths": [len(ids) for ids in row]}
        for row in documents()
    ]
    return PackingCollator(pad_token_id=0, max_length=32)(rows)


def padded_batch() -> dict[str, Tensor]:
    sequences = [ids for row in documents() for ids in row]
    length = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (length - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": mask}


def loss_and_gradients(
    teacher: PreTrainedModel, student: PreTrainedModel, batch: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    causal = is_causal(teacher)
    criterion = MiniLMLoss(("qk", "kk", "vv"), causal=causal)
    with torch.no_grad():
        teacher_qkv = relation_qkv(attention_qkv(teacher, model_inputs(teacher, batch, causal)), batch)
    student_qkv = relation_qkv(attention_qkv(student, model_inputs(student, batch, causal)), batch)
    loss, _ = criterion(teacher_qkv, student_qkv, **relation_mask(batch))
    parameters = [p for p in student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss, [torch.zeros(()) if g is None else g for g in gradients]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_is_unpacked(family: str, attention: str) -> None:
    teacher = tiny_model(family, attn_implementation=attention)
    student = build_student(teacher, num_layers=2, seed=1, init="random").eval()
    student.set_attn_implementation(attention)
    check_packable(student)
    packed = loss_and_gradients(teacher, student, packed_batch())
    padded = loss_and_gradients(teacher, student, padded_batch())
    assert padded[0] > 1e-3
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-7)
    for ours, expected in zip(packed[1], padded[1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) + 1e-8)


def test_models_whose_layers_all_have_a_window() -> None:
    from transformers import MistralConfig, MistralModel

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=48,
        sliding_window=6,
    )
    teacher = MistralModel(config).eval()
    student = build_student(teacher, num_layers=2, seed=1, init="random").eval()
    packed, padded = (loss_and_gradients(teacher, student, batch)[0] for batch in (packed_batch(), padded_batch()))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-7)


def test_what_a_batch_holds() -> None:
    packed, padded = packed_batch(), padded_batch()
    for batch in (packed, padded):
        assert (count_sequences(batch), count_tokens(batch)) == (7, sum(map(sum, ROWS)))
    mask = token_mask(packed)
    assert mask is not None
    assert (mask != 0).sum(1).tolist() == [sum(row) for row in ROWS]
    padded["attention_mask"][1] = 0
    assert (count_sequences(padded), count_tokens(padded)) == (6, sum(map(sum, ROWS)) - ROWS[0][1])
    images = tiny_inputs(tiny_model("vit"))
    assert (count_sequences(images), count_tokens(images), token_mask(images)) == (2, 0, None)
    assert count_tokens({"input_ids": torch.zeros(3, 5, dtype=torch.long)}) == 15


def test_roberta_counts_positions_from_behind_the_paddings() -> None:
    roberta = tiny_model("roberta")
    assert first_position(roberta) == roberta.config.pad_token_id + 1
    assert first_position(tiny_model("bert")) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_of_a_prefix_see_each_other_both_ways(family: str) -> None:
    """The last token of the prefix changes what the first one is, and one behind the prefix does not."""
    model, batch = tiny_model(family), tiny_inputs(tiny_model(family), (9, 6))
    batch["prefix_lengths"] = torch.tensor([4, 2])

    def first_query(change: int) -> Tensor:
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, change] = 7 + (changed["input_ids"][0, change] == 7)
        return attention_qkv(model, model_inputs(model, changed, causal=True))[0][0, :, 0]

    original = attention_qkv(model, model_inputs(model, batch, causal=True))[0][0, :, 0]
    assert not torch.allclose(first_query(3), original, atol=1e-4)
    torch.testing.assert_close(first_query(4), original)


def test_prefixes_reach_the_loss_and_padding_changes_nothing() -> None:
    teacher = tiny_model("llama")
    student = build_student(teacher, num_layers=2, seed=1, init="random").eval()
    batch = tiny_inputs(teacher, (9, 6))
    batch["prefix_lengths"] = torch.tensor([4, 2])
    inputs = model_inputs(teacher, batch, causal=True)
    qkv = attention_qkv(teacher, inputs), attention_qkv(student, inputs)
    loss, _ = MiniLMLoss(causal=True)(*qkv, **relation_mask(batch))
    expected = fused_minilm_loss(
        *qkv,
        attention_mask=batch["attention_mask"],
        causal=True,
        prefix_lengths=batch["prefix_lengths"],
        implementation="reference",
    )
    torch.testing.assert_close(loss, expected)
    batch["input_ids"][1, 6:] = 9
    torch.testing.assert_close(
        attention_qkv(teacher, model_inputs(teacher, batch, True))[0][1, :, :6], qkv[0][0][1, :, :6]
    )


def test_models_that_cannot_be_packed_are_refused() -> None:
    flash: Any = tiny_model("bert")
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"packing needs attention by 'sdpa' or 'eager', BertModel .* 'flash_attention_2'"
    ):
        check_packable(flash)
    with pytest.raises(ValueError, match="T5EncoderModel takes no position_ids: leave out --packing"):
        check_packable(tiny_model("t5", "EncoderModel"))
