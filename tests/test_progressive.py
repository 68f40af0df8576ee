"""MobileBERT's progressive schedule: a run for each layer, what is held in it, how it goes on, what it cannot have."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from one_step import trainer
from resuming import STEPS, each_trainer_with, weights
from test_masked_systems import masked_lm
from test_mobilebert import DISTILLATION, assert_learnt
from tiny_models import tiny_model
from tiny_text import write_lines
from transformers import AutoModelForMaskedLM, TrainerCallback

from minilm.cli.arguments import parse
from minilm.cli.building import rates, system_options
from minilm.cli.stages import stages
from minilm.errors import UsageError
from minilm.models.students import build_student
from minilm.models.weights import copy_ends, learning_rate_factors
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import Objective

TWO = {"num_hidden_layers": 2}
# A narrower FFN, so that the student's layers start at random.
SMALL = ["--student_num_layers", "2", "--student_intermediate_size", "32"]
PROGRESSIVE = ["--objective", "mobilebert-progressive", "--intermediate_steps", "3"]
WORDS = "bert.embeddings.word_embeddings.weight"


def of_layer(layer: int, folder: str) -> dict[str, torch.Tensor]:
    prefix = f"bert.encoder.layer.{layer - 1}."
    return {name: x for name, x in weights(folder).items() if name.startswith(prefix)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def stop_in(folder: str) -> type[TrainerCallback]:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and args.output_dir == folder:
                os.kill(os.getpid(), signal.SIGTERM)

    return Stop


def test_layer_after_layer_and_then_all_of_it(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, data = masked_lm(tmp_path / "teacher", **TWO), str(write_lines(tmp_path / "lines.txt", 60))
    argv = ["--teacher", teacher, "--data", data, *STEPS, *SMALL, *PROGRESSIVE, "--mlm_probability", "0.3"]
    code, _, err = command(*argv, "--output_dir", "whole")
    assert (code, err) == (0, ""), err
    first, second = "whole/layer-1", "whole/layer-2"
    assert_learnt(first, {"hidden_1": 1.0, "qk": 1.0})
    assert_learnt(second, {"hidden_2": 1.0, "qk": 1.0})
    assert_learnt("whole", DISTILLATION)
    steps = [json.loads(Path(folder, "metrics.json").read_text())["steps"] for folder in (first, second, "whole")]
    assert steps == [3, 3, 4]

    theirs = weights(teacher)
    for name, x in theirs.items():  # the ends are the teacher's until the last run
        if ".layer." not in name:
            assert torch.equal(weights(second)[name], x), name
    assert not torch.equal(weights("whole")[WORDS], theirs[WORDS])
    assert equal(of_layer(1, first), of_layer(1, second))
    assert not equal(of_layer(2, first), of_layer(2, second))
    for layer in (1, 2):
        assert not equal(of_layer(layer, second), of_layer(layer, "whole"))
    _, info = AutoModelForMaskedLM.from_pretrained("whole", output_loading_info=True)
    assert not info["missing_keys"]

    with each_trainer_with(stop_in("two/layer-2"), monkeypatch):
        assert command(*argv, "--output_dir", "two")[0] == 128 + signal.SIGTERM
    code, _, err = command(*argv, "--output_dir", "two")
    assert (code, "two holds a finished layer-1 student and no finished student: add --resume" in err) == (1, True)
    code, out, err = command(*argv, "--output_dir", "two", "--resume_from_checkpoint", "auto")
    assert (code, err) == (0, ""), err
    assert "two/layer-1" not in out  # it was not trained again
    assert json.loads(Path("two/layer-2/metrics.json").read_text())["steps_before_resuming"] == 2
    assert equal(weights("two"), weights("whole"))


def asked(tmp_path: Path, *flags: str) -> list[str]:
    teacher = masked_lm(tmp_path / "teacher")
    return ["--teacher", teacher, "--data", "d.txt", "--output_dir", "out", "--max_steps", "9", *PROGRESSIVE, *flags]


def test_each_layer_has_a_run(tmp_path: Path) -> None:
    beside = ["--embedding_weight", "2", "--student_embedding_dim", "8", "--output_temperature", "2"]
    runs = stages(parse(asked(tmp_path, "--student_num_layers", "2", "--layer_map", "2:4,1:-3", *beside)))
    folders = [None, str(Path("out/layer-1")), str(Path("out/layer-2"))]
    assert [run.training.output_dir for run in runs] == [*folders[1:], "out"]
    assert [run.model.student for run in runs] == folders
    assert [run.model.student_num_layers for run in runs] == [2, None, None]
    assert [run.objective.objective for run in runs] == [*["mobilebert-transfer"] * 2, "mobilebert-progressive"]
    assert [run.training.max_steps for run in runs] == [3, 3, 9]
    assert [run.objective.layer_map for run in runs] == ["1:2", "2:4", None]
    assert [run.objective.lower_lr_factor for run in runs] == [0.0, 0.0, None]
    assert [run.objective.embedding_weight for run in runs] == [None, None, 2.0]
    assert [run.model.student_embedding_dim for run in runs] == [None, None, 8]
    assert [system_options(run.objective, run.model) for run in runs] == [
        {"layer_map": {1: 2}},
        {"layer_map": {2: 4}},
        {"output_temperature": 2.0},
    ]
    assert len(stages(parse(asked(tmp_path, "--student_init_layers", "1,2,3,4")))) == 5
    with pytest.raises(UsageError, match="has 4 layers, the student, a BertConfig, 2: give --layer_map"):
        stages(parse(asked(tmp_path, "--student_init_layers", "1,4")))
    soft = stages(parse(asked(tmp_path, "--student_hidden_size", "32", "--lower_lr_factor", "0.1")))
    assert [run.objective.lower_lr_factor for run in soft] == [0.1] * 4 + [None]
    student = masked_lm(tmp_path / "student", family="mobilebert")
    first, second, *_ = stages(parse(asked(tmp_path, "--student", student)))
    assert [first.model.student, second.model.student] == [student, folders[1]]


def test_a_checkpoint_of_any_of_the_runs_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = asked(tmp_path, *SMALL, "--layer_map", "1:2,2:4")

    def resumed(checkpoint: str) -> list[tuple[str, str | None]]:
        runs = stages(parse([*argv, "--resume_from_checkpoint", checkpoint]))
        return [(str(run.training.output_dir), run.training.resume_from_checkpoint) for run in runs]

    one, two = str(Path("out/layer-1")), str(Path("out/layer-2"))
    of_second = str(Path(two, "checkpoint-2"))
    with pytest.raises(UsageError, match=r"of the layer-2 student, and \S+ holds no finished layer-1 student"):
        resumed(of_second)
    run = stages(parse(argv))[0]
    Path(one).mkdir(parents=True)
    Path(one, "metrics.json").write_text(json.dumps({"arguments": {"objective": run.objective.objective}}))
    assert resumed("auto") == [(two, "auto"), ("out", "auto")]
    assert resumed(of_second) == [(two, of_second), ("out", None)]
    with pytest.raises(UsageError, match=r"a checkpoint of the student, and \S+ holds no finished layer-2 student"):
        resumed(str(Path("out/checkpoint-2")))


def test_what_it_cannot_have_shows_before_the_first_run(command: CommandLine, tmp_path: Path, data: str) -> None:
    teacher = masked_lm(tmp_path / "teacher")

    def fails(message: str, *flags: str) -> None:
        code, _, err = command(
            "--teacher", teacher, "--data", data, *STEPS, "--output_dir", "out", *PROGRESSIVE, *flags
        )
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
        assert not Path("out").exists()

    fails("has 4 layers, the student, a BertConfig, 2: give --layer_map", "--student_num_layers", "2")
    fails("--layer_map 2:4 names 1 of the student's 2", "--student_num_layers", "2", "--layer_map", "2:4")
    fails("layer_map 1:1,2:5 names layer 5 of the teacher, which has 4", *SMALL, "--layer_map", "1:1,2:5")
    fails("32 numbers in a feature map, the student, a BertForMaskedLM, 16", "--student_hidden_size", "16")
    fails("has 4 attention heads, the student, a BertForMaskedLM, 2", *SMALL[2:], "--student_num_heads", "2")
    fails("--relations vv means nothing to --objective mobilebert", *SMALL[2:], "--relations", "vv")
    fails("the objective has an output loss of weight 0.5 already", *SMALL[2:], "--output_weight", "1")
    flags = ["--lower_lr_factor", "0.1", "--objective", "mobilebert-joint"]
    fails("--lower_lr_factor 0.1 means nothing to --objective mobilebert-joint", *SMALL[2:], *flags)
    fails("cannot load the student 'nowhere'", "--student", "nowhere")


def test_ends_are_the_teachers_where_they_fit() -> None:
    teacher = tiny_model("bert", "ForMaskedLM")
    for size, alike in ((32, True), (16, False)):
        student = build_student(teacher, num_layers=2, hidden_size=size, with_head=True, init="random")
        before = student.bert.encoder.layer[0].output.dense.weight.clone()
        copy_ends(teacher, student)
        assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight) == alike
        assert torch.equal(student.cls.predictions.bias, teacher.cls.predictions.bias)
        assert torch.equal(student.bert.encoder.layer[0].output.dense.weight, before)


def test_a_transfer_holds_the_ends_and_no_layer(tmp_path: Path) -> None:
    teacher = tiny_model("bert", "ForMaskedLM")
    student = build_student(teacher, with_head=True)
    objective = Objective(SYSTEMS["mobilebert"].terms(teacher, student))

    def held(*flags: str) -> set[str]:
        arguments = parse(asked(tmp_path, *SMALL, "--objective", *flags))
        return {name for name, factor in rates(arguments, teacher, student, objective).items() if factor != 1}

    assert held("mobilebert-transfer") == {name for name, _ in student.named_parameters() if ".layer." not in name}
    assert held("mobilebert") == set()


def test_embeddings_learn_with_layer_1_unless_they_are_the_teachers() -> None:
    teacher = tiny_model("bert", "ForMaskedLM")
    other, own = tiny_model("mobilebert", "ForMaskedLM", 1), build_student(teacher, with_head=True)
    assert not [name for name in learning_rate_factors(teacher, other, 1, 0.1) if name.startswith("mobilebert.")]
    later = learning_rate_factors(teacher, other, 3, 0.1)
    body = [name for name, _ in other.named_parameters() if name.startswith("mobilebert.")]
    lower = [name for name in body if not re.search(r"\.layer\.[23]\.", name)]
    assert {name: factor for name, factor in later.items() if name in body} == dict.fromkeys(lower, 0.1)
    ends = {name for name, _ in own.named_parameters() if ".layer." not in name}
    assert learning_rate_factors(teacher, own, 1, 0.1) == dict.fromkeys(ends, 0.0)
    second = learning_rate_factors(teacher, own, 2, 0.1)
    assert {name for name, factor in second.items() if factor == 0} == ends
    assert {name.split(".")[3] for name, factor in second.items() if factor == 0.1} == {"0"}


def test_a_factor_is_of_the_step_and_0_is_none(tmp_path: Path) -> None:
    """In plain gradient descent, also of what is decayed."""
    lower, held = "encoder.layer.0.", "embeddings."

    def moved(factors: dict[str, float]) -> dict[str, torch.Tensor]:
        run = trainer(tmp_path, own={"learning_rate_factors": factors}, weight_decay=0.1)
        before = {name: x.clone() for name, x in run.student.state_dict().items()}
        run.train()
        for name, parameter in run.student.named_parameters():  # no gradient goes that far
            assert not parameter.requires_grad or factors.get(name) != 0
        return {name: x - before[name] for name, x in run.student.state_dict().items()}

    names = list(moved({}))
    factors = {name: 0.1 for name in names if name.startswith(lower)}
    factors |= {name: 0.0 for name in names if name.startswith(held)}
    whole, part = moved({}), moved(factors)
    assert sum(bool(x.any()) for name, x in whole.items() if name.startswith((lower, held))) > 10
    for name, x in whole.items():
        if name.startswith(held):
            assert not part[name].any(), name
        else:
            torch.testing.assert_close(part[name], x * factors.get(name, 1.0), rtol=1e-3, atol=1e-6)


class Hidden(torch.optim.SGD):
    def __init__(self, groups: Any) -> None:
        super().__init__([torch.zeros(1)])


def test_an_optimiser_that_hides_its_parameters_is_refused(tmp_path: Path) -> None:
    names = [name for name, _ in build_student(tiny_model("bert"), num_layers=2).named_parameters() if ".0." in name]
    run = trainer(tmp_path, own={"learning_rate_factors": dict.fromkeys(names, 0.5)})
    run.optimizer_cls_and_kwargs = (Hidden, {})
    with pytest.raises(UsageError, match=r"16 parameters have learning rates of their own, and Hidden has 0 of them"):
        run.create_optimizer()
