"""Batches: packed sequences give the losses and gradients that they give apart, under every model; prefixes too."""

import re
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_encoder, tiny_inputs, tiny_model
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel

from minilm import MiniLMLoss, attention_qkv, fused_minilm_loss
from minilm.data.packing import PackingCollator
from minilm.models.batches import (
    as_packed,
    by_token,
    check_packable,
    check_prefixes,
    count_sequences,
    count_tokens,
    first_position,
    model_inputs,
    relation_mask,
    relation_qkv,
    token_mask,
)
from minilm.models.probes import is_causal
from minilm.models.students import build_student

FAMILIES = ["bert", "roberta", "distilbert", "electra", "modernbert", "llama", "qwen3", "gpt2", "embeddinggemma"]
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
    assert check_packable(student) == is_causal(teacher)
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


@pytest.mark.parametrize(
    ("family", "attention", "found"),
    [
        ("mobilebert", "sdpa", "does not keep packed sequences apart: its q, k, v or output differ by"),  # trigrams
        ("layoutlm", "eager", "does not keep packed sequences apart: its q, k, v or output differ by"),
        ("layoutlm", "sdpa", "does not take packed rows: leave out --packing (RuntimeError: "),
        ("esm", "sdpa", "does not take packed rows: leave out --packing (RuntimeError: "),
    ],
)
def test_models_that_mix_packed_sequences_are_refused(family: str, attention: str, found: str) -> None:
    model = tiny_model(family, attn_implementation=attention).train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=re.escape(f"Model {found}") + r"[^\n]*$"):
        check_packable(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_one_layer_that_mixes_only_behind_its_projections_is_refused() -> None:
    """q, k, v of a single layer never see its attention, the output does."""
    model = tiny_model("bert", num_hidden_layers=1)
    model.get_submodule("encoder.layer.0.attention").register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0],), {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="BertModel does not keep packed sequences apart"):
        check_packable(model)


def test_windows_wider_than_the_trial_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's, both ways, does not take in a token just as far away, as ModernBERT's does."""
    monkeypatch.setattr("minilm.models.batches._window_is_inclusive", {})
    model = tiny_model("embeddinggemma", sliding_window=24)
    assert model.config.sliding_window == 13  # half of it to either side
    check_packable(model)
    assert model.config.sliding_window == 13
    ids = [torch.tensor([row]) for row in documents()[0]]
    batch = as_packed(DataCollatorWithFlattening()([{"input_ids": x[0]} for x in ids]))
    packed = attention_qkv(model, model_inputs(model, batch, causal=False))
    for together, *parts in zip(packed, *(attention_qkv(model, {"input_ids": x}) for x in ids), strict=True):
        torch.testing.assert_close(together, torch.cat(parts, dim=2), rtol=1e-5, atol=1e-5)


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


def test_prefixes_are_tried() -> None:
    for family in ("bert", "llama", "gemma3_text", "gpt2"):
        check_prefixes(tiny_model(family))
    with pytest.raises(ValueError, match="OPTModel does not take the mask of a prefix"):
        check_prefixes(tiny_model("opt"))
    with pytest.raises(ValueError, match="MobileBertModel does not keep to the mask of a prefix: its tokens also see"):
        check_prefixes(tiny_model("mobilebert"))


FLAT = {"return_flash_attn_kwargs": True, "return_seq_idx": True}


@pytest.mark.parametrize(
    "told_by",
    [{}, FLAT, {**FLAT, "return_position_ids": False}, {"return_seq_idx": True, "return_position_ids": False}],
)
def test_flattened_sequences_become_packed(told_by: dict[str, Any]) -> None:
    sequences = [ids for row in documents() for ids in row]
    flat = DataCollatorWithFlattening(**told_by)([{"input_ids": ids} for ids in sequences])
    batch = as_packed(flat)
    assert set(batch) == {"input_ids", "labels", "position_ids", "sequence_ids", "cu_seqlens", "token_index"}
    assert "labels" not in model_inputs(tiny_model("roberta"), batch, causal=False)  # nobody computes that loss
    lengths = [len(ids) for ids in sequences]
    assert batch["cu_seqlens"].diff().tolist() == lengths
    assert batch["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert batch["token_index"].tolist() == list(range(sum(lengths)))
    assert (count_sequences(batch), count_tokens(batch)) == (len(lengths), sum(lengths))
    model = tiny_model("roberta")  # whose positions start behind the padding's
    packed = attention_qkv(model, model_inputs(model, batch, causal=False))
    alone = [attention_qkv(model, {"input_ids": torch.tensor([ids])}) for ids in sequences]
    for together, *parts in zip(packed, *alone, strict=True):
        torch.testing.assert_close(together, torch.cat(parts, dim=2), rtol=1e-5, atol=1e-5)


def test_rows_of_several_sequences_with_padding() -> None:
    ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 1], [1, 0, 1, 2, 3, 0]])
    batch = as_packed({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    assert batch["sequence_ids"].tolist() == [[1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 9, 10]
    assert batch["token_index"].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]


def test_positions_that_do_not_restart_are_left_alone() -> None:
    padded = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]]),
        "position_ids": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 2]]),  # counted from the mask, and with a hole
        "labels": torch.full((2, 4), -100),
    }
    assert as_packed(padded) == padded
    own = {"input_ids": torch.ones(2, 3, dtype=torch.long), "position_ids": torch.arange(3).expand(2, 3)}
    assert as_packed(own) == own
    with pytest.raises(ValueError, match=r"cu_seq_lens_q ends at 3, the batch is \(1, 4\)"):
        as_packed({"input_ids": torch.ones(1, 4, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 2, 3])})


def test_the_mask_of_samples_becomes_one_of_tokens() -> None:
    model = tiny_model("wav2vec2")
    mask = (torch.arange(200) < torch.tensor([[200], [100]])).long()
    batch = {"input_values": torch.randn(2, 200), "attention_mask": mask}
    tokens = attention_qkv(model, batch)[0].shape[2]
    alone = attention_qkv(model, {"input_values": batch["input_values"][1:, :100]})[0].shape[2]
    assert by_token(model, batch, tokens)["attention_mask"].sum(1).tolist() == [tokens, alone]
    assert (count_sequences(batch), count_tokens(batch)) == (2, 0)
    whisper = tiny_encoder("whisper")
    with pytest.raises(
        ValueError,
        match=r"attention_mask is \(2, 20\), and WhisperEncoder makes 10 tokens of .*: leave out the mask",
    ):
        by_token(whisper, {"input_features": torch.zeros(2, 8, 20), "attention_mask": torch.ones(2, 20)}, 10)


def test_models_that_cannot_be_packed_are_refused() -> None:
    flash: Any = tiny_model("bert")
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"packing needs attention by 'sdpa' or 'eager', BertModel .* 'flash_attention_2'"
    ):
        check_packable(flash)
    with pytest.raises(ValueError, match="T5EncoderModel takes no position_ids: leave out --packing"):
        check_packable(tiny_model("t5", "EncoderModel"))
