"""When a student serves without fine-tuning, and what then stands in its folder and report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from tiny_text import write_lines
from transformers import AutoModel, AutoTokenizer

from minilm.models.embeddings import pool

FLAGS = ["--student_num_layers", "2", "--max_steps", "3", "--max_length", "16", "--disable_tqdm", "true"]
ST = "sentence_transformers.models."
Distil = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def distil(command: CommandLine, teacher: str, tmp_path: Path) -> Distil:
    """Runs one step; gives metrics.json and report.md."""
    data = str(write_lines(tmp_path / "lines.txt", 400))  # twenty of them are held out

    def run(*flags: str, teacher: str = teacher, output: str = "out") -> tuple[dict[str, Any], str]:
        paths = ["--teacher", teacher, "--data", data, "--output_dir", output, "--save_strategy", "no"]
        code, _, err = command(*paths, *FLAGS, *flags)
        assert code == 0, err
        return json.loads(Path(output, "metrics.json").read_text()), Path(output, "report.md").read_text("utf-8")

    return run


def add_sentence_files(folder: str, pooling: str = "cls") -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{ST}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{ST}Pooling"},
    ]
    Path(folder, "1_Pooling").mkdir()
    Path(folder, "modules.json").write_text(json.dumps(modules))
    Path(folder, "1_Pooling", "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode": pooling})
    )


def test_with_the_teachers_own_last_layer_it_serves_at_once(distil: Distil) -> None:
    metrics, report = distil("--learning_rate", "0.01")
    assert metrics["serves"]
    assert "the student serves as it is" in report
    assert metrics["pooling"] == ["mean"]
    assert set(metrics["agreement"]["start"]) == {"correlation", "neighbours"}
    assert metrics["agreement"]["texts"] == 20
    assert metrics["agreement"]["start"] != metrics["agreement"]["end"]


def test_without_texts_enough_the_report_says_so(command: CommandLine, teacher: str, data: str) -> None:
    code, out, _ = command("--teacher", teacher, "--data", data, "--output_dir", "out", *FLAGS)
    assert code == 0
    assert json.loads(Path("out/metrics.json").read_text())["agreement"] is None
    assert "Agreement with the teacher is measured on at least 3 held-out texts; there are 2." in out


def test_it_starts_from_the_layers_that_are_named(distil: Distil, teacher: str) -> None:
    metrics, _ = distil("--student_init_layers", "1,-1", "--learning_rate", "0")
    assert metrics["serves"]
    whole, student = (AutoModel.from_pretrained(folder) for folder in (teacher, "out"))
    for mine, theirs in ((0, 0), (1, 3)):
        layers = student.encoder.layer[mine].state_dict(), whole.encoder.layer[theirs].state_dict()
        assert all(torch.equal(layers[0][name], tensor) for name, tensor in layers[1].items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--student_init", "random"],
        ["--student_hidden_size", "16"],
        ["--student_init", "slice", "--student_intermediate_size", "64"],
        ["--teacher_layer", "2"],
        ["--layer_map", "1:4,2:1"],
        ["--student_init_layers", "2,1"],
    ],
)
def test_with_anything_else_there_it_needs_fine_tuning(distil: Distil, flags: list[str]) -> None:
    metrics, report = distil(*flags)
    assert not metrics["serves"]
    assert "fine-tune the student" in report
    assert "feature-extraction" not in report


def test_a_student_of_one_that_does_not_serve_does_not_either(distil: Distil) -> None:
    distil("--student_init", "random", output="first")
    metrics, _ = distil(teacher="first", output="second")
    assert not metrics["serves"]


def test_the_two_lines_encode_as_the_model_does(distil: Distil) -> None:
    _, report = distil()
    *_, lines = report.split("```python\n")
    names: dict[str, Any] = {}
    exec(lines.split("```")[0], names)
    inputs = AutoTokenizer.from_pretrained("out")("A sentence.", return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained("out")(**inputs).last_hidden_state
    torch.testing.assert_close(names["vector"], pool(hidden, inputs["attention_mask"], ["mean"])[0])


def test_sentence_files_go_along_where_the_width_is_the_teachers(distil: Distil, teacher: str) -> None:
    add_sentence_files(teacher)
    metrics, report = distil()
    assert metrics["pooling"] == ["cls"]
    assert Path("out/1_Pooling/config.json").read_bytes() == Path(teacher, "1_Pooling/config.json").read_bytes()
    assert json.loads(Path("out/modules.json").read_text()) == json.loads(Path(teacher, "modules.json").read_text())
    assert "SentenceTransformer('out')" in report
    distil("--student_init", "random", output="random")
    assert Path("random/modules.json").exists()
    distil("--student_hidden_size", "16", output="narrow")
    assert not Path("narrow/modules.json").exists()
