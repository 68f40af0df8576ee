"""TinyBERT: its terms on models, layer maps, its two stages as runs of one command, and what it cannot have."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from one_step import sequences, trainer
from resuming import STEPS, each_trainer_with, run_whole_and_in_two, weights
from test_cli_kinds import with_head
from test_trainer import assert_close
from tiny_models import tiny_model
from tiny_text import save_teacher, write_lines
from tinybert_step import one_step
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback
from two_ranks import whole_halves_and_ranks

from minilm.cli.arguments import parse
from minilm.cli.building import system_options
from minilm.cli.stages import stages
from minilm.errors import UsageError
from minilm.models.students import build_student
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import Objective
from minilm.training.saving import OBJECTIVE
from minilm.training.trainer import DistillationTrainer

SMALL = ["--student_num_layers", "2", "--student_hidden_size", "16"]
CLASSIFIER = {"head": "ForSequenceClassification", "num_labels": 3}


def as_written(run: DistillationTrainer, layers: dict[int, int]) -> dict[str, float]:
    """Section 3.1, text by text, from transformers' hidden states and each layer's own queries and keys."""
    projection = run.terms[0].projection.weight.double()
    names = ["embedding", *(f"hidden_{m}" for m in layers), *(f"scores_{m}" for m in layers)]
    errors: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in sequences():
        inputs = {"input_ids": torch.tensor([row["input_ids"]]), "output_hidden_states": True}
        with torch.no_grad():
            theirs, mine = (model.eval()(**inputs).hidden_states for model in (run.teacher, run.student))
        for m, n in {0: 0, **layers}.items():
            name = f"hidden_{m}" if m else "embedding"
            errors[name] += (mine[m][0].double() @ projection.T - theirs[n][0].double()).square()
        for m, n in layers.items():
            s_t, s_s = scores(run.teacher, theirs, n), scores(run.student, mine, m)
            errors[f"scores_{m}"].append((s_t - s_s).square().mean())
    return {name: torch.stack(values).mean().item() for name, values in errors.items()}


def scores(model: PreTrainedModel, hidden: tuple[Tensor, ...], layer: int) -> Tensor:
    """(H, N, N) float64, before the softmax."""
    attention = model.encoder.layer[layer - 1].attention.self
    with torch.no_grad():
        q, k = (
            project(hidden[layer - 1][0]).unflatten(1, (4, -1)).transpose(0, 1).double()
            for project in (attention.query, attention.key)
        )
    return q @ k.mT / q.shape[-1] ** 0.5


@pytest.mark.parametrize("layers", [None, {1: 1, 2: 3}])
def test_the_objective_is_the_papers_sum(tmp_path: Path, layers: dict[int, int] | None) -> None:
    """Of a teacher that came in training mode, with dropout: TinyBERT's own code leaves it there."""
    teacher = tiny_model("bert")
    terms = SYSTEMS["tinybert"].terms(teacher, build_student(teacher, num_layers=2), layer_map=layers)
    run = trainer(tmp_path, teacher=teacher.train(), criterion=Objective(terms), per_device_eval_batch_size=3)
    metrics = run.evaluate(sequences())
    expected = as_written(run, layers or {1: 2, 2: 4})
    assert list(expected) == run.parts
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(expected.values()), rel=1e-5)


def test_all_of_the_student_is_trained_but_its_pooler(tmp_path: Path) -> None:
    teacher = tiny_model("bert")
    run = trainer(
        tmp_path, criterion=Objective(SYSTEMS["tinybert"].terms(teacher, build_student(teacher, num_layers=2)))
    )
    frozen = {name for name, parameter in run.student.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}


def test_one_micro_batch_several_and_two_ranks_take_the_same_step(tmp_path: Path) -> None:
    folders = whole_halves_and_ranks(one_step, tmp_path)
    first, *others = [
        AutoModel.from_pretrained(folder).state_dict() | torch.load(folder / "checkpoint-1" / OBJECTIVE)
        for folder in folders
    ]
    logged = [json.loads((folder / "log.json").read_text()) for folder in folders]
    for other, log in zip(others, logged[1:], strict=True):
        assert_close(other, first, rtol=1e-5, atol=1e-6)
        assert log == pytest.approx(logged[0], rel=1e-5)


def test_what_tinybert_cannot_have() -> None:
    def told(teacher: PreTrainedModel, student: PreTrainedModel, name: str = "tinybert") -> str:
        with pytest.raises(UsageError) as error:
            Objective(SYSTEMS[name].terms(teacher, student)).probe(teacher, student)
        return str(error.value)

    bert = tiny_model("bert")
    three, wide = (build_student(bert, **sizes) for sizes in ({"num_layers": 3}, {"num_layers": 2, "num_heads": 2}))
    assert told(bert, three) == (
        "the teacher's 4 layers are not divisible by the student's 3: give --layer_map, as in 1:1,3:4"
    )
    assert "the teacher has 4 heads and the student 2" in told(bert, wide)
    assert "LlamaModel sees none ahead" in told(tiny_model("llama"), tiny_model("llama"))
    assert "ViTModel takes pixel_values" in told(tiny_model("vit"), tiny_model("vit"))
    masked_lm = tiny_model("bert", "ForMaskedLM")
    assert "the teacher is a BertForMaskedLM: fine-tune it" in told(masked_lm, masked_lm, "tinybert-task")


def test_a_general_student_is_trained_resumed_bit_by_bit_and_loads(
    tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = save_teacher(tmp_path / "teacher"), write_lines(tmp_path / "lines.txt")
    argv = ["--teacher", str(teacher), "--data", str(data), "--objective", "tinybert", *STEPS, *SMALL]
    run_whole_and_in_two(command, monkeypatch, argv)
    metrics = json.loads(Path("whole/metrics.json").read_text())
    assert list(metrics["heldout"]) == ["embedding", "hidden_1", "hidden_2", "scores_1", "scores_2"]
    assert all(ends["end"] < ends["start"] for ends in metrics["heldout"].values())
    log = json.loads(Path("whole/checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "embedding" in row] == [1, 2, 3, 4]
    assert AutoModel.from_pretrained("whole").config.hidden_size == 16
    assert "Its hidden states were trained, and no head" in Path("whole/report.md").read_text()


class StopInTheSecondRun(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and args.output_dir == "third":
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_task_is_two_runs_that_go_on_wherever_they_stopped(
    tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a general student's folder."""
    teacher, data = with_head(tmp_path / "teacher", **CLASSIFIER), write_lines(tmp_path / "lines.txt")
    tiny_model("bert", num_hidden_layers=2, hidden_size=16).save_pretrained("general")
    argv = ["--teacher", str(teacher), "--data", str(data), "--student", "general", *STEPS]
    argv += ["--objective", "tinybert-task", "--intermediate_steps", "3", "--layer_map", "1:1,2:3"]
    run_whole_and_in_two(command, monkeypatch, argv)
    first, second = (json.loads(Path(folder, "metrics.json").read_text()) for folder in ("whole/intermediate", "whole"))
    assert (first["steps"], second["steps"]) == (3, 4)
    assert (first["objective"], second["objective"]) == ("tinybert", "tinybert-task")
    assert list(first["heldout"]) == ["embedding", "hidden_1", "hidden_2", "scores_1", "scores_2"]
    assert list(second["heldout"]) == ["output"]
    assert second["heldout"]["output"]["end"] < second["heldout"]["output"]["start"]
    _, info = AutoModelForSequenceClassification.from_pretrained("whole", output_loading_info=True)
    assert not info["missing_keys"]
    key = "embeddings.word_embeddings.weight"
    general, middle, last = (weights(folder) for folder in ("general", "whole/intermediate", "whole"))
    assert not torch.equal(general[key], middle[key])
    assert not torch.equal(middle[key], last[f"bert.{key}"])

    with each_trainer_with(StopInTheSecondRun, monkeypatch):
        assert command(*argv, "--output_dir", "third")[0] == 128 + signal.SIGTERM
    code, _, err = command(*argv, "--output_dir", "third")
    assert code == 1
    assert "third holds an unfinished run" in err
    code, out, err = command(*argv, "--output_dir", "third", "--resume_from_checkpoint", "auto")
    assert (code, err) == (0, "")
    assert "third/intermediate" not in out  # it was not trained again
    assert all(torch.equal(x, weights("third")[name]) for name, x in last.items())


def test_what_a_task_cannot_have_shows_before_its_first_run(tmp_path: Path, command: CommandLine, data: str) -> None:
    def told(teacher: Path, *flags: str) -> str:
        argv = ["--teacher", str(teacher), "--data", data, "--output_dir", "out", "--objective", "tinybert-task"]
        code, _, err = command(*argv, *STEPS, *SMALL, *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert not Path("out/intermediate").exists()
        return err

    classifier = with_head(tmp_path / "classifier", **CLASSIFIER)
    assert "has no trained head (it was saved as BertModel)" in told(save_teacher(tmp_path / "base"))
    assert "fine-tune it on the task first" in told(with_head(tmp_path / "masked", "ForMaskedLM"))
    assert "--packing puts texts together that BertForSequenceClassification" in told(classifier, "--packing")
    assert "--relations vv means nothing to --objective tinybert" in told(classifier, "--relations", "vv")
    assert "has stages of its own: leave out --assistant_num_layers" in told(classifier, "--assistant_num_layers", "2")


def test_a_dry_run_of_a_task(tmp_path: Path, command: CommandLine, data: str) -> None:
    teacher = with_head(tmp_path / "teacher", **CLASSIFIER)
    argv = ["--teacher", str(teacher), "--data", data, "--output_dir", "out", "--objective", "tinybert-task"]
    code, out, err = command(*argv, *STEPS, *SMALL, "--dry_run")
    assert (code, err) == (0, "")
    assert "objective  tinybert (embedding + hidden_1" in out
    assert not Path("out").exists()


def test_the_two_runs_of_a_task() -> None:
    argv = ["--teacher", "t", "--data", "d.txt", "--output_dir", "out", *SMALL, "--max_steps", "9"]
    first, second = stages(parse([*argv, "--objective", "tinybert-task", "--layer_map", "1:1,2:3"]))
    assert (first.objective.objective, second.objective.objective) == ("tinybert", "tinybert-task")
    assert (first.objective.layer_map, second.objective.layer_map) == ("1:1,2:3", None)
    assert (first.training.max_steps, second.training.max_steps) == (9, 9)
    assert (first.model.student, second.model.student) == (None, str(Path("out/intermediate")))
    assert (first.model.student_num_layers, second.model.student_num_layers) == (2, None)
    assert [run.training.output_dir for run in (first, second)] == [str(Path("out/intermediate")), "out"]
    (plain,) = stages(parse([*argv, "--intermediate_steps", "3"]))
    with pytest.raises(ValueError, match="--intermediate_steps 3 means nothing to --objective minilm"):
        system_options(plain.objective, plain.model)
