"""mlm-kd and distilbert: their formulas on whole models, the masks both models read, and what cannot be."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from masked_step import MASKED, OPTIONS, two_steps
from one_step import NO_DROPOUT, sequences
from safetensors.torch import load_file
from test_trainer import assert_close
from tiny_models import tiny_model
from tiny_text import save_teacher, tiny_tokenizer, write_lines
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForMaskedLM, DataCollatorWithPadding, PreTrainedModel
from two_ranks import whole_halves_and_ranks

from minilm.data.packing import PackingCollator, pack
from minilm.models.batches import Batch, model_inputs
from minilm.models.observe import observe
from minilm.models.students import build_student
from minilm.objectives.hidden import HiddenCosine
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import LOSS, Objective
from minilm.training.trainer import DistillationTrainer

STEPS = [
    *("--student_num_layers", "2", "--max_length", "24", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu"),
    *("--per_device_train_batch_size", "8", "--max_steps", "4"),
]


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A masked LM, and a student of two of its four layers that has moved since."""
    teacher = tiny_model("bert", "ForMaskedLM")
    student = build_student(teacher, num_layers=2, with_head=True).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return teacher, student


def batch(padding: int = 0) -> dict[str, Tensor]:
    """Of 11 and 6 tokens, a third of them labelled, with more padding on demand."""
    draw = torch.Generator().manual_seed(4)
    mask = (torch.arange(11 + padding) < torch.tensor([11, 6])[:, None]).long()
    ids = torch.zeros_like(mask)
    labels = torch.full_like(mask, -100)
    ids[:, :11] = torch.randint(5, 57, (2, 11), generator=draw) * mask[:, :11]
    chosen = torch.rand(2, 11, generator=draw) < 0.35
    labels[:, :11][chosen] = ids[:, :11][chosen]
    labels[mask == 0] = -100
    ids[:, :11][chosen & (mask[:, :11] == 1)] = 4
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outputs(system: str, teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    objective = Objective(SYSTEMS[system].terms(teacher, student))
    with torch.no_grad():
        given = observe(teacher, model_inputs(teacher, batch, False), objective.teacher)
    return objective(given, observe(student, model_inputs(student, batch, False), objective.student), batch)


def kl(teacher: Tensor, student: Tensor, temperature: float, where: Tensor) -> Tensor:
    """Σ p log(p / q), the mean over the tokens of `where`."""
    p, q = (torch.softmax(z / temperature, -1) for z in (teacher, student))
    return (p * (p / q).log()).sum(-1)[where].mean()


def formula(system: str, teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """As the papers write it, of transformers' own logits and hidden states."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    theirs, mine = (model(**inputs, output_hidden_states=True) for model in (teacher, student))
    real, labelled = batch["attention_mask"] == 1, batch["labels"] != -100
    if system == "mlm":
        loss = cross_entropy(mine.logits[labelled], batch["labels"][labelled])
        return {LOSS: loss, "mlm": loss}
    if system == "mlm-kd":
        output = kl(theirs.logits.detach(), mine.logits, 1.0, labelled)
        return {LOSS: output, "output": output}
    parts = {
        "output": 2.0**2 * kl(theirs.logits.detach(), mine.logits, 2.0, real),
        "mlm": cross_entropy(mine.logits[labelled], batch["labels"][labelled]),
        "cosine": 1 - cosine_similarity(theirs.hidden_states[-1].detach(), mine.hidden_states[-1], dim=-1)[real].mean(),
    }
    return {LOSS: 5 * parts["output"] + 2 * parts["mlm"] + parts["cosine"]} | parts


def gradient(loss: Tensor, model: PreTrainedModel) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.double().flatten() for g in gradients])


@pytest.mark.parametrize("system", MASKED)
def test_loss_and_gradients_are_the_papers(system: str) -> None:
    teacher, student = models()
    exact = copy.deepcopy(teacher).double(), copy.deepcopy(student).double()
    expected, actual = formula(system, *exact, batch()), outputs(system, teacher, student, batch())
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5), name
        assert value.requires_grad == (name == LOSS)
    true = gradient(expected[LOSS], exact[1])
    assert (gradient(actual[LOSS], student) - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("system", MASKED)
def test_more_padding_changes_nothing(system: str) -> None:
    pair = models()
    few, many = outputs(system, *pair, batch()), outputs(system, *pair, batch(padding=9))
    for name, value in few.items():
        torch.testing.assert_close(many[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("system", MASKED)
def test_packed_rows_are_the_sequences_alone(system: str) -> None:
    pair = models()
    padded, packed = (collate(rows) for rows, collate in packed_and_padded())
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    alone, together = outputs(system, *pair, labelled(padded)), outputs(system, *pair, labelled(packed))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-7)


def packed_and_padded() -> list[tuple[Any, Any]]:
    data = sequences().select_columns(["input_ids", "attention_mask"])
    packed = pack(data, 24)
    padding, packing = DataCollatorWithPadding(tiny_tokenizer()), PackingCollator(0, 24)
    return [(list(data), padding), ([packed[row] for row in range(len(packed))], packing)]


def labelled(batch: Batch) -> Batch:
    """Each third word of the vocabulary is a label."""
    ids = batch["input_ids"]
    return {**batch, "labels": torch.where((ids % 3 == 0) & (ids > 0), ids, -100)}


def test_padding_has_no_share_in_distilberts_soft_labels() -> None:
    """Ports of it take the mean over padded tokens too, of whose logits a longer batch has more."""
    teacher, student = models()
    padded = batch(padding=9)
    inputs = {name: x for name, x in padded.items() if name != "labels"}
    with torch.no_grad():
        mine = outputs("distilbert", teacher, student, padded)["output"]
        of_teacher, of_student = (model(**inputs).logits for model in (teacher, student))
    of_all, of_tokens = (
        4 * kl(of_teacher, of_student, 2.0, where) for where in (padded["labels"] < 99, inputs["attention_mask"] == 1)
    )
    assert mine.item() == pytest.approx(of_tokens.item(), rel=1e-5)
    assert abs(of_all / mine - 1) > 0.02  # a little: random models err alike on padding


@pytest.mark.parametrize("system", ["mlm-kd", "distilbert"])
def test_the_softmax_is_taken_once(system: str) -> None:
    """GLMKD takes it of probabilities: as good as uniform over a vocabulary, so that hardly a loss is left."""
    teacher, student = models()
    with torch.no_grad():
        for model in (teacher, student):
            model.get_output_embeddings().weight.mul_(8)  # sure of what they say, and not of one mind
        mine, once = (f(system, teacher, student, batch())["output"] for f in (outputs, formula))
        inputs = {name: x for name, x in batch().items() if name != "labels"}
        p, q = (model(**inputs).logits.softmax(-1) for model in (teacher, student))
    assert mine.item() == pytest.approx(once.item(), rel=1e-4)
    assert mine > 1
    assert kl(p, q, 1.0, batch()["attention_mask"] == 1) < 0.1


def test_the_cosine_of_nan_behind_the_mask_and_of_no_token() -> None:
    term = HiddenCosine(3.0)
    nothing = observe(models()[0], {}, type(term.student)())
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]])
    theirs, mine = (torch.randn(2, 4, 6, generator=draw) for _ in range(2))
    expected = 3 * (1 - cosine_similarity(theirs.double(), mine.double(), dim=-1)[mask == 1]).mean()
    theirs[mask == 0] = mine[mask == 0] = torch.nan
    for x in (theirs, mine):
        x.requires_grad_()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        of_teacher, of_student = (nothing._replace(final=x.to(dtype)) for x in (theirs, mine))
        loss, parts = term(of_teacher, of_student, {"attention_mask": mask})
        assert (loss.dtype, list(parts)) == (torch.float32, ["cosine"])
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        gradient, of_teachers = torch.autograd.grad(loss, (mine, theirs), allow_unused=True)
        assert of_teachers is None
        assert gradient.isfinite().all()
        assert not gradient[mask == 0].any()
    loss, _ = term(of_teacher, of_student, {"attention_mask": torch.zeros_like(mask)})
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, mine)[0].any()


def test_one_micro_batch_several_and_two_ranks_take_the_same_steps(tmp_path: Path) -> None:
    runs = whole_halves_and_ranks(two_steps, tmp_path)
    for system in OPTIONS:
        folders = [folder / system for folder in runs]
        first, *others = [AutoModelForMaskedLM.from_pretrained(folder).state_dict() for folder in folders]
        logged = [json.loads((folder / "log.json").read_text()) for folder in folders]
        assert len(logged[0]["loss"]) == 2
        for other, log in zip(others, logged[1:], strict=True):
            assert_close(other, first, rtol=1e-5, atol=1e-6)
            assert log.keys() == logged[0].keys()
            for name, values in log.items():
                assert values == pytest.approx(logged[0][name], rel=1e-5), name


def masked_lm(folder: Path, head: str = "ForMaskedLM", family: str = "bert", **config: Any) -> str:
    tiny_model(family, head, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("system", MASKED)
def test_a_run_goes_on_bitwise_and_leaves_a_masked_lm(command: CommandLine, tmp_path: Path, system: str) -> None:
    teacher, data = masked_lm(tmp_path / "teacher"), str(write_lines(tmp_path / "lines.txt", 60))
    argv = ["--teacher", teacher, "--data", data, *STEPS, "--objective", system, "--save_steps", "2"]
    code, out, err = command(*argv, "--output_dir", "whole")
    assert (code, err) == (0, "")
    shutil.copytree("whole/checkpoint-2", "again/checkpoint-2")
    code, _, err = command(*argv, "--output_dir", "again", "--resume_from_checkpoint", "auto")
    assert (code, err) == (0, "")
    whole, again = (load_file(Path(folder, "model.safetensors")) for folder in ("whole", "again"))
    start = load_file("whole/checkpoint-2/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(start[name], tensor) for name, tensor in whole.items())

    student, info = AutoModelForMaskedLM.from_pretrained("whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert student.config.num_hidden_layers == 2
    metrics = json.loads(Path("whole/metrics.json").read_text())
    parts = {"mlm": {"mlm": 1.0}, "mlm-kd": {"output": 1.0}, "distilbert": {"output": 5.0, "mlm": 2.0, "cosine": 1.0}}[
        system
    ]
    assert metrics["parts"] == parts
    assert metrics["arguments"]["output_temperature"] == (2.0 if system == "distilbert" else 1.0)
    log = json.loads(Path("whole/checkpoint-4/trainer_state.json").read_text())["log_history"]
    losses = [row for row in log if "loss" in row]
    assert len(losses) == 4
    for row in losses:
        assert row["loss"] == pytest.approx(sum(weight * row[part] for part, weight in parts.items()), rel=1e-4)
    assert all(0 < ends["end"] != ends["start"] for ends in metrics["heldout"].values())

    card = Path("whole/README.md").read_text(encoding="utf-8")
    for told in (out, card):
        assert "student = AutoModelForMaskedLM.from_pretrained('whole')" in told
        assert "The whole student was trained, up to what it returns: it serves as it is." in told
        names: dict[str, Any] = {}
        exec(told.split("```python\n")[-1].split("```")[0], names)
        assert names["words"][0]["sequence"].startswith("a ")
    assert "curves.png" in out


def spied(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """The batches that both models get, by step; -1 is the evaluation's."""
    seen: dict[int, dict[str, Tensor]] = {}
    ready = DistillationTrainer.ready

    def keep(self: DistillationTrainer, batch: Batch, step: int) -> dict[str, Any]:
        masked = ready(self, batch, step)
        before = seen.get(step)
        assert before is None or step == 0 or torch.equal(before["labels"], masked["labels"])
        seen[step] = masked
        return masked

    monkeypatch.setattr(DistillationTrainer, "ready", keep)
    return seen


def test_masks_are_new_in_each_epoch_and_the_held_out_ones_stay(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All texts are one batch, and the student stands still: what changes are the masks."""
    teacher, data = masked_lm(tmp_path / "teacher", **NO_DROPOUT), str(write_lines(tmp_path / "lines.txt", 200))
    seen = spied(monkeypatch)
    code, _, err = command(
        *("--teacher", teacher, "--data", data, "--output_dir", "out", *STEPS, "--objective", "mlm-kd"),
        *("--per_device_train_batch_size", "190", "--max_steps", "3", "--learning_rate", "0", "--mlm_probability"),
        *("0.4", "--whole_word_masking", "--eval_strategy", "steps", "--eval_steps", "1"),
    )
    assert (code, err) == (0, "")
    log = json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())["log_history"]
    assert len({row["output"] for row in log if "loss" in row}) == 3
    heldout = [row["eval_output"] for row in log if "eval_loss" in row]
    assert len(heldout) == 4
    assert len(set(heldout)) == 1

    pieces = tiny_tokenizer().convert_ids_to_tokens(range(57))
    continues = torch.tensor([piece.startswith("##") for piece in pieces])
    for step in range(3):
        labels, ids = seen[step]["labels"], seen[step]["input_ids"]
        chosen = labels != -100
        read = torch.where(chosen, labels, ids)
        ordinary = read > 4
        assert ordinary.sum() > 1000
        assert chosen.sum() / ordinary.sum() == pytest.approx(0.4, abs=0.06)
        inside = continues[read]
        assert torch.equal(chosen[:, 1:][inside[:, 1:]], chosen[:, :-1][inside[:, 1:]])


@pytest.mark.parametrize("system", MASKED)
def test_what_a_system_cannot_have_is_one_sentence(
    command: CommandLine, tmp_path: Path, data: str, system: str
) -> None:
    def fails(message: str, teacher: str, *flags: str) -> None:
        code, _, err = command(
            "--teacher", teacher, "--data", data, "--output_dir", "out", *STEPS, "--objective", system, *flags
        )
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
        assert not Path("out").exists()

    teacher = masked_lm(tmp_path / "teacher")
    fails("was saved as BertModel", str(save_teacher(tmp_path / "base")))
    classifier = masked_lm(tmp_path / "classifier", "ForSequenceClassification", num_labels=3)
    fails("a BertForSequenceClassification, which classifies: masked tokens need a masked LM", classifier)
    decoder = masked_lm(tmp_path / "decoder", "ForCausalLM", "llama")
    fails("a LlamaForCausalLM, which predicts the next token: masked tokens need a masked LM", decoder)
    if weight := {"mlm-kd": 1, "distilbert": 5}.get(system):
        already = f"output_weight is 0.5, and the objective has an output loss of weight {weight} already"
        fails(already, teacher, "--output_weight", "0.5")
    fails(f"--relation_heads 4 means nothing to --objective {system}", teacher, "--relation_heads", "4")
    fails("mlm_probability is 1.0: it must lie between 0 and 1", teacher, "--mlm_probability", "1")
    if system == "distilbert":
        narrow = "the cosine of last hidden states needs one width: the teacher's is 32, the student's 16"
        fails(narrow, teacher, "--student_hidden_size", "16")


def test_a_temperature_counts_though_it_is_the_flags_default(command: CommandLine, tmp_path: Path) -> None:
    teacher, data = masked_lm(tmp_path / "teacher"), str(write_lines(tmp_path / "lines.txt", 60))
    argv = ["--teacher", teacher, "--data", data, *STEPS, "--objective", "distilbert"]
    losses = {}
    for folder, flags in (("default", []), ("one", ["1"]), ("two", ["2"])):
        temperature = ["--output_temperature", *flags] if flags else []
        code, _, err = command(*argv, *temperature, "--output_dir", folder)
        assert (code, err) == (0, "")
        losses[folder] = json.loads(Path(folder, "metrics.json").read_text())["heldout"]["output"]["start"]
    default, one, two = losses.values()
    assert default == two != one


def test_held_out_texts_without_a_label_are_told(command: CommandLine, tmp_path: Path, data: str) -> None:
    teacher = masked_lm(tmp_path / "teacher")
    argv = ["--teacher", teacher, "--data", data, "--output_dir", "out", *STEPS, "--objective", "mlm-kd"]
    code, _, err = command(*argv, "--mlm_probability", "1e-9")
    assert (code, err.count("\n")) == (1, 1)
    assert "the held-out texts, 2, are too few: a loss is the mean over nothing in them" in err
