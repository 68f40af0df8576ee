"""MobileBERT: its formulas on whole models of both classes, and its runs from the command line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from masked_step import PROBABILITY
from resuming import STEPS, run_whole_and_in_two
from test_masked_systems import batch, gradient, kl, labelled, masked_lm, packed_and_padded
from tiny_models import tiny_model
from tiny_text import write_lines
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm
from transformers import AutoModelForMaskedLM, PreTrainedModel

from minilm import MiniLMLoss
from minilm.models.batches import Batch, model_inputs
from minilm.models.observe import Observed, observe
from minilm.objectives.relations import Relations
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import LOSS, Objective

LAYERS = {1: 1, 2: 2, 3: 3, 4: 4}


def models(family: str = "bert") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A BERT, and a student of either class, 32 wide between its layers."""
    return tuple(
        tiny_model(name, "ForMaskedLM", i, attn_implementation="eager") for i, name in enumerate(("bert", family))
    )


def outputs(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch, **options: Any) -> dict[str, Tensor]:
    objective = Objective(SYSTEMS["mobilebert"].terms(teacher, student, **options))
    with torch.no_grad():
        given = observe(teacher, model_inputs(teacher, batch, False), objective.teacher)
    return objective(given, observe(student, model_inputs(student, batch, False), objective.student), batch)


def formula(
    teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch, layers: dict[int, int]
) -> dict[str, Tensor]:
    """Equations 2 to 4 of the paper, of transformers' own feature maps, attention and logits."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    theirs, mine = (model(**inputs, output_hidden_states=True, output_attentions=True) for model in (teacher, student))
    real, labelled = batch["attention_mask"] == 1, batch["labels"] != -100
    parts: dict[str, Tensor] = {}
    for layer, of_teacher in layers.items():
        maps = theirs.hidden_states[of_teacher].detach(), mine.hidden_states[layer]
        of_teacher_map, of_student_map = (layer_norm(x, x.shape[-1:], eps=1e-12)[real] for x in maps)
        parts[f"hidden_{layer}"] = (of_teacher_map - of_student_map).square().mean()
    for layer, of_teacher in layers.items():
        a_t, a_s = theirs.attentions[of_teacher - 1].detach(), mine.attentions[layer - 1]
        texts = []
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            p, q = (a[row, :, :length, :length] for a in (a_t, a_s))
            texts.append((p * (p / q).log()).sum() / (p.shape[0] * length))
        parts[f"qk_{layer}"] = torch.stack(texts).mean()
    parts["output"] = kl(theirs.logits.detach(), mine.logits, 1.0, labelled)
    parts["mlm"] = cross_entropy(mine.logits[labelled], batch["labels"][labelled])
    half = {"output": 0.5, "mlm": 0.5}
    return {LOSS: sum((half.get(name, 1.0) * part for name, part in parts.items()), torch.zeros(()))} | parts


@pytest.mark.parametrize(("family", "layers"), [("bert", {1: 2, 3: 3}), ("mobilebert", None)])
def test_loss_and_gradients_are_the_papers(family: str, layers: dict[int, int] | None) -> None:
    teacher, student = models(family)
    exact = copy.deepcopy(teacher).double(), copy.deepcopy(student).double()
    expected, actual = formula(*exact, batch(), layers or LAYERS), outputs(teacher, student, batch(), layer_map=layers)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    true = gradient(expected[LOSS], exact[1])
    assert (gradient(actual[LOSS], student) - true).norm() <= 1e-5 * true.norm()


def test_more_padding_changes_nothing() -> None:
    pair = models()
    few, many = outputs(*pair, batch()), outputs(*pair, batch(padding=7))
    for name, value in few.items():
        torch.testing.assert_close(many[name], value, rtol=1e-5, atol=1e-7)


def test_packed_rows_are_the_sequences_alone() -> None:
    teacher, student = models()
    padded, packed = (labelled(collate(rows)) for rows, collate in packed_and_padded())
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    alone, together = outputs(teacher, student, padded), outputs(teacher, student, packed)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-7)


def test_keys_of_negative_scores_count() -> None:
    """TextBrewer's cross-entropy of attention drops the teacher's keys whose scores lie below -0.001."""
    draw = torch.Generator().manual_seed(0)
    q_t, k_t, q_s, k_s = (torch.randn(2, 4, 9, 8, generator=draw, dtype=torch.float64) for _ in range(4))
    q_t -= 1  # so that most of the scores are negative
    k_t += 1
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    term = Relations(MiniLMLoss({"qk": 1.0}))
    loss, _ = term(Observed({-1: (q_t, k_t, k_t)}, {}), Observed({-1: (q_s, k_s, k_s)}, {}), {"attention_mask": mask})
    kept, dropped = [], []
    for row, length in enumerate((9, 5)):
        scores_t, scores_s = (
            (q[row, :, :length] @ k[row, :, :length].mT / 8**0.5) for q, k in ((q_t, k_t), (q_s, k_s))
        )
        p, q = scores_t.softmax(-1), scores_s.softmax(-1)
        rows = p * (p / q).log()
        kept.append(rows.sum(-1).mean())
        dropped.append(torch.where(scores_t <= -1e-3, 0, rows).sum(-1).mean())
    assert loss.item() == pytest.approx(torch.stack(kept).mean().item(), rel=1e-6)
    assert abs(torch.stack(dropped).mean() / loss - 1) > 0.5


TRANSFER = dict.fromkeys([f"{part}_{layer}" for part in ("hidden", "qk") for layer in LAYERS], 1.0)
DISTILLATION = {"output": 0.5, "mlm": 0.5}


def assert_learnt(folder: str, parts: dict[str, float]) -> None:
    metrics = json.loads(Path(folder, "metrics.json").read_text())
    assert metrics["parts"] == parts
    start, end = (
        sum(weight * metrics["heldout"][part][at] for part, weight in parts.items()) for at in ("start", "end")
    )
    assert 0 < end < start


@pytest.mark.parametrize("schedule", ["auxiliary", "joint"])
def test_a_run_goes_on_bitwise_and_leaves_a_masked_lm(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    teacher, data = masked_lm(tmp_path / "teacher"), str(write_lines(tmp_path / "lines.txt", 60))
    argv = ["--teacher", teacher, "--data", data, *STEPS, "--mlm_probability", str(PROBABILITY), "--objective"]
    if schedule == "auxiliary":
        family, flags = "mobilebert", ["mobilebert", "--student", masked_lm(tmp_path / "student", family="mobilebert")]
    else:
        family, flags = "bert", ["mobilebert-joint", "--student_num_layers", "4", "--student_init", "random"]
    run_whole_and_in_two(command, monkeypatch, [*argv, *flags])
    if schedule == "auxiliary":
        assert_learnt("whole", TRANSFER | DISTILLATION)
    else:
        assert_learnt("whole/transfer", TRANSFER)
        assert_learnt("whole", DISTILLATION)
    student, info = AutoModelForMaskedLM.from_pretrained("whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert student.config.model_type == family


def test_what_it_cannot_have_is_one_sentence(command: CommandLine, tmp_path: Path, data: str) -> None:
    teacher = masked_lm(tmp_path / "teacher")

    def fails(message: str, *flags: str) -> None:
        argv = [
            "--teacher",
            teacher,
            "--data",
            data,
            *STEPS,
            "--objective",
            "mobilebert",
            "--output_dir",
            "out",
            *flags,
        ]
        code, _, err = command(*argv)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
        assert not Path("out").exists()

    of_four = ["--student_num_layers", "4"]
    fails("has 4 layers, the student, a BertForMaskedLM, 2: give --layer_map", "--student_num_layers", "2")
    fails("layer_map 1:5 names layer 5 of the teacher, which has 4", *of_four, "--layer_map", "1:5")
    fails(
        "the teacher, a BertForMaskedLM, has 32 numbers in a feature map, the student, a MobileBertForMaskedLM, 24: "
        "give --student_hidden_size the teacher's, or train a teacher of the student's width, such as a MobileBert",
        *("--student", masked_lm(tmp_path / "student", family="mobilebert", hidden_size=24)),
    )
    fails("has 4 attention heads, the student, a BertForMaskedLM, 2", *of_four, "--student_num_heads", "2")
    fails("--teacher_layer 3 means nothing to --objective mobilebert", *of_four, "--teacher_layer", "3")
