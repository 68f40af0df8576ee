"""Relations of any layers by `--layer_map`: layer to layer, one middle layer of a decoder, and maps that cannot be."""

import json
from pathlib import Path

import pytest
from conftest import CommandLine
from resuming import STEPS, run_whole_and_in_two
from tiny_models import tiny_model
from tiny_text import save_teacher, write_lines
from transformers import AutoModel

from minilm.models.students import build_student
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import Objective


@pytest.mark.parametrize(
    ("family", "flags", "layers", "parts"),
    [
        ("bert", ["--student_num_layers", "2"], "1:2,-1:4", ["qk_1", "vv_1", "qk_2", "vv_2"]),
        (
            *("bert", ["--student_num_layers", "4", "--objective", "minilm-v2"], "1:1,2:2,3:3,4:4"),
            [f"{relation}_{layer}" for layer in "1234" for relation in ("qq", "kk", "vv")],
        ),
        # One middle layer of a decoder of the same depth, as BitDistill has it.
        ("llama", ["--student_num_layers", "4", "--packing"], "3:2", ["qk", "vv"]),
    ],
)
def test_the_layers_of_a_map_are_learnt(
    tmp_path: Path,
    command: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    flags: list[str],
    layers: str,
    parts: list[str],
) -> None:
    teacher, data = save_teacher(tmp_path / "teacher", family), write_lines(tmp_path / "lines.txt")
    argv = ["--teacher", str(teacher), "--data", str(data), *STEPS, *flags, "--student_init", "random"]
    out = run_whole_and_in_two(command, monkeypatch, [*argv, "--layer_map", layers])
    assert f" on layers {layers}" in out
    assert f" on layers {layers}: 4 steps" in Path("whole/report.md").read_text()
    metrics = json.loads(Path("whole/metrics.json").read_text())
    assert list(metrics["heldout"]) == list(metrics["parts"]) == parts
    assert all(ends["end"] < ends["start"] for ends in metrics["heldout"].values())
    assert AutoModel.from_pretrained("whole").config.num_hidden_layers == int(flags[1])


def test_what_lies_above_the_highest_layer_of_a_map_is_frozen() -> None:
    teacher = tiny_model("llama")
    student = build_student(teacher, init="random", seed=0)
    Objective(SYSTEMS["minilm"].terms(teacher, student, layer_map={3: 1, 2: 4})).freeze_unused(teacher, student)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    third = {f"layers.2.{part}.weight" for part in ("input_layernorm", *(f"self_attn.{x}_proj" for x in "qkv"))}
    below = ("embed_tokens.", "layers.0.", "layers.1.")
    assert trained == third | {name for name, _ in student.named_parameters() if name.startswith(below)}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--layer_map", "9:1"], "layer_map 9:1 names layer 9 of the student, which has 4"),
        (["--layer_map", "1:2,2:0"], "layer_map 1:2,2:0 names layer 0 of the teacher, which has 4"),
        (["--layer_map", "4:4,-1:3"], "layer_map 4:4,-1:3 names layer 4 of the student twice, then as -1"),
        (["--layer_map", "4:4,4:3"], "student layer 4 stands twice in '4:4,4:3'"),
        (["--layer_map", "2:2", "--teacher_layer", "3"], "teacher_layer is 3 and layer_map {2: 2}: give one of them"),
    ],
)
def test_maps_that_cannot_be(command: CommandLine, teacher: str, data: str, flags: list[str], problem: str) -> None:
    argv = ["--teacher", teacher, "--data", data, *STEPS, "--student_num_layers", "4", "--output_dir", "out", *flags]
    assert command(*argv) == (2, "", f"minilm-train: error: {problem}\n")
    assert not Path("out").exists()
