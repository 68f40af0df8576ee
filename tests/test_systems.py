"""Objectives by name: their relations and heads for a pair of models, and what cannot be."""

import doctest
from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder, tiny_model
from transformers import PreTrainedModel

from minilm import MiniLMLoss
from minilm.models.probes import is_causal
from minilm.objectives import parsing
from minilm.objectives.relations import Relations
from minilm.objectives.systems import SYSTEMS, with_soft_labels
from minilm.objectives.term import Objective


def model(heads: int, dim: int, key_heads: int | None = None) -> PreTrainedModel:
    """Of one layer with so many heads of that dimension."""
    sizes = {"num_hidden_layers": 1, "hidden_size": heads * dim, "num_attention_heads": heads}
    if key_heads is None:
        return tiny_model("bert", **sizes)
    return tiny_model("llama", **sizes, num_key_value_heads=key_heads)


def criterion_of(name: str, teacher: PreTrainedModel, student: PreTrainedModel, **options: Any) -> MiniLMLoss:
    """Of a system's relations, tried once."""
    (relations,) = SYSTEMS[name].terms(teacher, student, **options)
    assert isinstance(relations, Relations)
    assert relations.layers == {-1: -1}
    Objective([relations]).probe(teacher, student)
    return relations.criterion


def test_minilm_is_qk_and_vv_with_the_models_own_heads() -> None:
    criterion = criterion_of("minilm", model(12, 64), model(12, 32))
    assert (criterion.relations, criterion.relation_heads) == ({"qk": 1.0, "vv": 1.0}, None)


@pytest.mark.parametrize(
    ("teacher", "student", "heads"),
    [
        ((12, 64), (12, 32), 48),  # MiniLMv2, section 4.1: base teachers
        ((16, 64), (12, 32), 64),  # and large ones
        ((12, 64), (5, 12), 12),  # 48 does not divide 60
        ((4, 8, 1), (4, 8, 1), 4),  # 16 does not divide the 8 of keys and values
    ],
)
def test_minilm_v2_takes_four_heads_to_each_of_the_teachers(
    teacher: tuple[int, ...], student: tuple[int, ...], heads: int
) -> None:
    criterion = criterion_of("minilm-v2", model(*teacher), model(*student))
    assert (list(criterion.relations), criterion.relation_heads) == (["qq", "kk", "vv"], heads)


def test_what_is_asked_for_comes_before_the_objectives_own() -> None:
    criterion = criterion_of(
        "minilm-v2", model(4, 8), model(4, 8), relations={"qv": 2.0}, relation_heads=8, relation_temperature=2.0
    )
    assert (criterion.relations, criterion.relation_heads) == ({"qv": 2.0}, 8)
    assert (criterion.temperature, criterion.causal) == (2.0, False)


def test_soft_labels_may_be_all_that_is_learnt() -> None:
    teacher = tiny_model("bert", "ForMaskedLM")
    assert with_soft_labels([], teacher, 2.0).parts == {"output": 2.0}


def test_what_does_not_fit_is_an_error_before_training() -> None:
    with pytest.raises(
        ValueError, match=r"neither 48 nor 12 .* the widths \[50, 768\] .* choose --relation_heads from 1, 2$"
    ):
        criterion_of("minilm-v2", model(12, 64), model(5, 10))
    with pytest.raises(ValueError, match=r"12 .* 6"):
        criterion_of("minilm", model(12, 64), model(6, 64))
    with pytest.raises(ValueError, match="unknown relation 'qx'"):
        criterion_of("minilm", model(4, 8), model(4, 8), relations={"qx": 1.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "config", "causal"),
    [
        ("bert", {}, False),
        ("bert", {"is_decoder": True}, True),
        ("gpt2", {}, True),
        ("llama", {}, True),
        ("llama", {"is_causal": False}, False),
        ("llama", {"num_hidden_layers": 1}, True),  # whose q, k, v alone would not tell
        ("llama", {"num_hidden_layers": 1, "is_causal": False}, False),
        ("clip_text_model", {}, True),
        ("embeddinggemma", {}, False),
        ("gemma3_text", {}, True),
        ("mistral", {}, True),
        ("layoutlm", {}, False),
        ("vit", {}, False),
        ("whisper", {}, False),
    ],
)
def test_causality_is_what_the_model_does(
    family: str, config: dict[str, Any], causal: bool, dtype: torch.dtype
) -> None:
    model = tiny_encoder(family, **config).to(dtype).train()
    state = torch.get_rng_state()
    assert is_causal(model) is causal
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_models_that_look_ahead_from_some_tokens_only_are_refused() -> None:
    model = tiny_model("llama", is_causal=False)
    position = torch.arange(8)
    prefix = (position[None] <= position[:, None]) | (position < 3)
    for layer in range(4):
        model.get_submodule(f"layers.{layer}.self_attn").register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": prefix[None, None]}), with_kwargs=True
        )
    with pytest.raises(ValueError, match="LlamaModel looks ahead from early tokens only"):
        is_causal(model)


def test_models_that_need_more_than_tokens_are_refused_in_a_sentence() -> None:
    model = tiny_model("bert")
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"BertModel does not run on a few random tokens alone \(ZeroDivisionError: "):
        is_causal(model)


def test_the_examples_of_the_documentation() -> None:
    assert doctest.testmod(parsing).attempted > 0
    assert doctest.testmod(parsing).failed == 0
