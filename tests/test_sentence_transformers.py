"""The relation loss as Sentence Transformers' Trainer takes it."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import NO_DROPOUT
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_text import lines, save_teacher, tiny_tokenizer
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from two_ranks import whole_halves_and_ranks

from minilm import RelationLoss, capture

TEXTS = ["one two three", "a", "some words more than that"], ["x y", "and z", "then a longer text", "w"]
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Makes a SentenceTransformer of a tiny model; imported here, where it is needed, for it takes seconds."""
    st = pytest.importorskip("sentence_transformers")

    def make(family: str = "bert", **config: Any) -> Any:
        folder = save_teacher(tmp_path_factory.mktemp(family), family, **config)
        return st.SentenceTransformer(str(folder), device="cpu")

    return make


@pytest.fixture
def teacher(load: Load) -> Any:
    return load()


@pytest.fixture
def student(load: Load) -> Any:
    return load(num_hidden_layers=2, seed=5, **NO_DROPOUT)


def features(model: Any) -> list[dict[str, Any]]:
    return [dict(model.preprocess(list(texts))) for texts in TEXTS]


def transformer(model: Any) -> Any:
    return model[0].auto_model


def formula(student: Any, teacher: Any, relations: tuple[str, ...], heads: int) -> Tensor:
    """MiniLM, equations 6 to 10, in float64, one text after another."""
    of_texts = []
    for text in [text for texts in TEXTS for text in texts]:
        tokens = student.tokenizer(text, return_tensors="pt")
        taken = []
        for model in (teacher, student):
            with capture(transformer(model)) as captured:
                transformer(model)(**tokens)
            split = [x.transpose(1, 2).flatten(2)[0] for x in captured[-1]]
            taken.append(
                {name: x.unflatten(1, (heads, -1)).permute(1, 2, 0) for name, x in zip("qkv", split, strict=True)}
            )
        for pair in relations:
            sides = [(m[pair[0]], m[pair[1]]) for m in taken]
            a_t, a_s = ((x.mT @ y / math.sqrt(x.shape[1])).log_softmax(-1) for x, y in sides)
            of_texts.append((a_t.detach().exp() * (a_t.detach() - a_s)).sum(-1).mean())
    return torch.stack(of_texts).sum() / sum(map(len, TEXTS))


@pytest.mark.parametrize(("relations", "heads"), [(("qk", "vv"), None), (("qq", "kk", "vv"), 8)])
def test_loss_and_gradients_are_the_formula_on_the_texts_one_by_one(
    student: Any, teacher: Any, relations: tuple[str, ...], heads: int | None
) -> None:
    loss = RelationLoss(student, teacher, relations, heads)
    value = loss(features(student), None)
    assert value.dtype == torch.float32
    value.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    student.double().zero_grad()
    expected = formula(student, teacher.double(), relations, heads or 4)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    of_formula = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == of_formula.keys()
    assert len(gradients) > 20
    whole = torch.cat([g.flatten() for g in of_formula.values()])
    assert (torch.cat([g.flatten() for g in gradients.values()]) - whole).norm() < 1e-5 * whole.norm()


def test_what_relations_do_not_reach_gets_no_gradient_and_the_teacher_stays_as_it_is(
    student: Any, teacher: Any
) -> None:
    loss = RelationLoss(student, teacher).train()  # the teacher has dropout, the student has none
    columns = features(student)
    given = [dict(column) for column in columns]
    first, second = loss(columns), loss(columns)
    assert columns == given
    assert torch.equal(first, second)
    assert transformer(teacher).training
    first.backward()
    untouched = {name.split("0.model.")[1] for name, p in student.named_parameters() if p.grad is None}
    assert {name.rpartition(".")[0] for name in untouched} == {
        *("encoder.layer.1.attention.output.dense", "encoder.layer.1.attention.output.LayerNorm"),
        *("encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense", "encoder.layer.1.output.LayerNorm"),
        "pooler.dense",
    }
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_the_students_forward_is_its_own_again(student: Any, teacher: Any) -> None:
    """As accelerate sets it for mixed precision, too."""
    loss = RelationLoss(student, teacher)
    loss(features(student))
    assert "forward" not in vars(student)
    calls: list[str] = []
    inner = student.forward

    def forward(column: dict[str, Any]) -> dict[str, Any]:
        calls.append("own")
        return inner(column)

    student.forward = forward
    loss(features(student))
    assert calls == ["own"] * len(TEXTS)
    assert student.forward is forward


def test_a_teacher_of_transformers_and_another_of_its_layers(student: Any, load: Load) -> None:
    whole, first_two = load(), load(num_hidden_layers=2)
    first_two[0].auto_model.load_state_dict(
        {name: x for name, x in transformer(whole).state_dict().items() if name in transformer(first_two).state_dict()}
    )
    loss = RelationLoss(student, transformer(whole), teacher_layer=2)
    assert torch.equal(loss(features(student)), RelationLoss(student, first_two)(features(student)))


def test_flattened_texts_are_told_apart(load: Load) -> None:
    """As it hands them to models with flash attention; Llama tells them apart by their positions in any attention."""
    student, teacher = load("llama", num_hidden_layers=2, seed=5), load("llama")
    loss = RelationLoss(student, teacher)
    padded = student.preprocess(list(TEXTS[0]))
    lengths = padded["attention_mask"].sum(1)
    flat = {
        "input_ids": padded["input_ids"][padded["attention_mask"].bool()][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "cu_seq_lens_q": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_length_q": 30,
        "modality": "text",
    }
    torch.testing.assert_close(loss([flat]), loss([padded]))


class Sum(nn.Module):
    """Of losses, as users write it."""

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.model = losses[0].model

    def forward(self, sentence_features: Any, labels: Any) -> Tensor:
        columns = list(sentence_features)
        return torch.stack([loss(columns, labels) for loss in self.losses]).sum()


@pytest.mark.parametrize("bf16", [False, True])
def test_their_trainer_trains_it_alone_and_in_a_sum(student: Any, teacher: Any, tmp_path: Path, bf16: bool) -> None:
    import datasets
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    relations = RelationLoss(student, teacher)
    loss = Sum(relations, MultipleNegativesRankingLoss(student)) if bf16 else relations
    before = {name: p.clone() for name, p in student.named_parameters()}
    start = relations(features(student)).item()
    trainer = SentenceTransformerTrainer(
        student,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            bf16=bf16,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": lines(8), "positive": lines(8, seed=1)}),
        loss=loss,
    )
    trainer.train()
    assert relations(features(student)).item() < 0.9 * start
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert ("0.model.encoder.layer.1.output.dense.weight" in changed) == bf16  # of the last layer the other loss's
    student.save(str(tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert ("wang2020minilm" in card) != bf16  # which tells nothing of what a sum is of
    loaded = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    saved = loaded.state_dict()
    assert all(torch.equal(saved[name], x) for name, x in student.state_dict().items())


def test_under_mixed_precision_the_teacher_computes_in_the_students_dtype(student: Any, teacher: Any) -> None:
    loss = RelationLoss(student, teacher)
    exact = loss(features(student))
    seen = []
    hook = (
        transformer(teacher)
        .encoder.layer[3]
        .attention.self.query.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16), hook:
        ranked = loss(features(student))
    assert (ranked.dtype, set(seen)) == (torch.float32, {torch.bfloat16})
    assert ranked.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("beside_another", [False, True])
def test_data_parallel_ranks_average_its_gradients(student: Any, teacher: Any, beside_another: bool) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    def gradients(loss: nn.Module) -> dict[str, Tensor]:
        student.zero_grad()
        loss(features(student), None).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    losses = [RelationLoss(student, teacher), *([MultipleNegativesRankingLoss(student)] if beside_another else [])]
    expected = gradients(Sum(*losses))
    ranked = nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
    averaged: list[int] = []

    def average(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        averaged.append(bucket.index())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer() * 2)  # an average that shows
        return done

    ranked.register_comm_hook(None, average)
    for loss in losses:
        loss.model = ranked  # as their Trainer does
    for _ in range(2):  # a parameter that was waited for in vain stops the second step
        twice = gradients(Sum(*losses))
        assert expected.keys() <= twice.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(twice[name], 2 * gradient)
    assert len(averaged) >= 2


def test_one_micro_batch_several_and_two_ranks_take_the_same_step(tmp_path: Path) -> None:
    """Under their Trainer a step is the mean of its micro-batches' means: equal to one where these have equal sizes."""
    pytest.importorskip("sentence_transformers")
    from relation_step import one_step

    folders = whole_halves_and_ranks(one_step, tmp_path)
    first, *others = [load_file(folder / "model.safetensors") for folder in folders]
    start = load_file(tmp_path / "whole" / "start" / "model.safetensors")
    assert sum(not torch.equal(x, start[name]) for name, x in first.items()) > 20
    logged = [json.loads((folder / "log.json").read_text()) for folder in folders]
    for other, loss in zip(others, logged[1:], strict=True):
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-6)
        assert loss == pytest.approx(logged[0], rel=1e-5)


def test_needs_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # importing it raises
    spec = importlib.util.find_spec("minilm.objectives.sentence_transformers")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.RelationLoss.__name__ == "RelationLoss"


def read_otherwise(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("n", "m")


def know_another(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["ß"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            read_otherwise,
            r"the student's tokenizer reads 'Déjà .*' as \[2, .*\], the teacher's as \[2, .*\]: relations",
        ),
        (know_another, "the student's tokenizer reads 'ß' as None, the teacher's as 57: relations"),
    ],
)
def test_another_tokenizer_is_refused(
    student: Any, teacher: Any, change: Callable[[PreTrainedTokenizerBase], None], told: str
) -> None:
    change(teacher.tokenizer)
    with pytest.raises(ValueError, match=told):
        RelationLoss(student, teacher)


def test_what_does_not_fit_is_refused_with_both_numbers(student: Any, load: Load) -> None:
    with pytest.raises(ValueError, match="max_length 64 is more than the teacher's 32 positions"):
        RelationLoss(student, load(max_position_embeddings=32))
    with pytest.raises(ValueError, match="has 57 tokens, the teacher embeds 40"):
        RelationLoss(student, tiny_model("bert", vocab_size=40))
    with pytest.raises(ValueError, match="5 relation heads do not divide the teacher's width 32"):
        RelationLoss(student, load(), relation_heads=5)
    with pytest.raises(ValueError, match="8 heads in the teacher and 4 in the student"):
        RelationLoss(student, load(num_attention_heads=8))


def test_models_without_attention_and_replicas_are_refused(student: Any, teacher: Any) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match="the student begins with a StaticEmbedding, which has no attention"):
        RelationLoss(static, teacher)
    with pytest.raises(ValueError, match="the teacher begins with a StaticEmbedding"):
        RelationLoss(student, static)
    with pytest.raises(ValueError, match="the student begins with a BertModel"):
        RelationLoss(transformer(student), teacher)
    loss = RelationLoss(student, teacher)
    loss.model = nn.DataParallel(student)
    with pytest.raises(ValueError, match=r"on 0 devices \(DataParallel\)"):
        loss(features(student))
