"""Students that go on from a folder: their weights, their heads, what does not go with the teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from test_cli_kinds import with_head
from tiny_models import tiny_model
from tiny_text import save_teacher
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from minilm.models.continued import load_student, with_same_head
from minilm.models.heads import check_output
from minilm.models.probes import probe_inputs

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 64}
RUN = [
    *("--max_length", "12", "--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "2"),
    *("--disable_tqdm", "true", "--use_cpu", "--save_steps", "2", "--learning_rate", "1e-2"),
]


def small(folder: Path, head: str = "Model", **config: Any) -> str:
    tiny_model("bert", head, seed=5, **{**SMALL, **config}).save_pretrained(folder)
    return str(folder)


def test_a_base_model_is_what_was_saved(tmp_path: Path) -> None:
    name = small(tmp_path / "small")
    student = load_student(name, tiny_model("bert"))
    saved = AutoModel.from_pretrained(name).state_dict()
    assert student.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in student.state_dict().items())


@pytest.mark.parametrize("saved_labels", [None, 2])
def test_a_classifiers_student_has_its_labels_and_a_new_head(tmp_path: Path, saved_labels: int | None) -> None:
    """Whether the folder holds a base model, or a classifier of other labels."""
    head = {"head": "Model"} if saved_labels is None else {"head": "ForSequenceClassification", "num_labels": 2}
    name = small(tmp_path / "small", **head)
    teacher = tiny_model("bert", "ForSequenceClassification", num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    state = torch.get_rng_state()
    student, again, other = (load_student(name, teacher, with_head=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(student) is type(teacher)
    assert student.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert student.classifier.weight.shape == (3, 16)
    assert torch.equal(student.classifier.weight, again.classifier.weight)
    assert not torch.equal(student.classifier.weight, other.classifier.weight)
    body = AutoModel.from_pretrained(name).state_dict()
    assert all(torch.equal(student.bert.state_dict()[key], tensor) for key, tensor in body.items())
    check_output(student, probe_inputs(student))
    untrained = with_same_head(load_student(name, teacher), teacher)
    assert {key: x.shape for key, x in untrained.state_dict().items()} == {
        key: x.shape for key, x in student.state_dict().items()
    }


def test_a_head_that_was_saved_goes_on(tmp_path: Path) -> None:
    name = small(tmp_path / "small", "ForMaskedLM")
    student = load_student(name, tiny_model("bert", "ForMaskedLM"), with_head=True)
    saved = AutoModelForMaskedLM.from_pretrained(name).state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in student.state_dict().items())


def test_what_does_not_go_with_the_teacher_is_told(tmp_path: Path) -> None:
    teacher = tiny_model("bert")
    with pytest.raises(ValueError, match=r"has a vocabulary of 50, the teacher one of 60: both read the same tokens"):
        load_student(small(tmp_path / "words", vocab_size=50), teacher)
    tiny_model("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"the student '.*vit' takes pixel_values, the teacher input_ids"):
        load_student(str(tmp_path / "vit"), teacher)
    with pytest.raises(ValueError, match=r"cannot load the student '/nowhere'"):
        load_student("/nowhere", teacher)
    name = small(tmp_path / "broken")
    config = json.loads(Path(name, "config.json").read_text())
    Path(name, "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"the weights of the student '.*broken' lack 16 of its tensors"):
        load_student(name, teacher)
    Path(name, "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(ValueError, match=r"the weights of the student '.*broken' do not fit its config"):
        load_student(name, teacher)


def test_a_student_goes_on_by_the_command_line(tmp_path: Path, command: CommandLine, data: str) -> None:
    teacher = str(with_head(tmp_path / "teacher", "ForSequenceClassification", num_labels=3))
    name = small(tmp_path / "small")
    argv = ["--teacher", teacher, "--student", name, "--data", data, "--output_dir", "out", *RUN]
    code, _, err = command(*argv, "--output_weight", "1")
    assert (code, err) == (0, "")
    _, info = AutoModelForSequenceClassification.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"]
    assert AutoModel.from_pretrained("out").config.hidden_size == 16
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["student"] == {"name": "out", "layers": 2, "hidden_size": 16, "heads": 4}

    tiny_model("bert", seed=6, **SMALL).save_pretrained(name)  # another student in the same folder
    Path("out/metrics.json").unlink()
    code, _, err = command(*argv, "--output_weight", "1", "--resume_from_checkpoint", "auto")
    assert code == 2
    assert "belongs to another run: its hash of the student's first weights is" in err


def test_what_does_not_go_with_a_student_is_told(tmp_path: Path, command: CommandLine, data: str) -> None:
    teacher = str(save_teacher(tmp_path / "teacher"))
    name = small(tmp_path / "small", max_position_embeddings=10)
    argv = ["--teacher", teacher, "--student", name, "--data", data, "--output_dir", "out", *RUN]

    def told(*flags: str) -> str:
        code, _, err = command(*flags)
        assert (code, err.count("\n")) == (2, 1)
        return err

    for flag, value in (("student_num_layers", "2"), ("student_init", "random"), ("student_init_layers", "1")):
        assert f"has sizes and weights of its own: leave out --{flag} {value}" in told(*argv, f"--{flag}", value)
    assert "max_length 12 is more than the student's 10 positions" in told(*argv)
    assert "--student is given without --data" in told("--student", name)


def test_what_to_name_instead_is_told_with_its_flag(tmp_path: Path) -> None:
    name = small(tmp_path / "small")
    with pytest.raises(ValueError, match=f"it is a file: name the folder that holds it, --student {name}$"):
        load_student(f"{name}/config.json", tiny_model("bert"))
    with pytest.raises(ValueError, match=f"the model is in a folder below it: --student {name}$"):
        load_student(str(tmp_path), tiny_model("bert"))
