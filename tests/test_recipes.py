"""Recipes: each parses into a run, names its source, and gives way to later flags."""

import re
from pathlib import Path

import pytest
import transformers

from minilm.cli.arguments import Arguments, parse
from minilm.cli.recipes import FOLDER, expand, listing, names


@pytest.fixture(autouse=True)
def without_a_gpus_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 and bf16 are refused on some machines; what is tested here is what stands in the recipe."""
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)


def run_of(recipe: str, *flags: str) -> Arguments:
    return parse(["--recipe", recipe, "--output_dir", "out", *flags])


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_a_run_with_its_source(name: str) -> None:
    arguments = run_of(name)
    assert not arguments.demo
    model, training = arguments.model, arguments.training
    assert model.teacher
    assert arguments.data.data
    size = re.search(r"l(\d+)-h(\d+)", name)
    assert size
    assert (model.student_num_layers, model.student_hidden_size) == (int(size[1]), int(size[2]))
    assert training.max_steps > training.warmup_steps > 0
    comments = [line for line in (FOLDER / f"{name}.txt").read_text().splitlines() if line.startswith("#")]
    assert any(word in " ".join(comments[1:]) for word in ("et al.", "course project", "No paper"))


@pytest.mark.parametrize(
    ("name", "batch", "rate", "heads", "layer"),
    [
        ("minilm-v1-l6-h768", 1024, 5e-4, None, -1),  # MiniLM, section 4.1
        ("minilm-v1-l6-h384", 256, 3e-4, None, -1),
        ("minilm-v2-l6-h384", 256, 6e-4, 48, 12),  # MiniLMv2, section 4.1
        ("minilm-v2-l6-h768-bert-large", 256, 6e-4, 64, 21),
        ("minilm-v2-l12-h384-xlmr-large", 256, 6e-4, 64, 19),
    ],
)
def test_the_papers_numbers(name: str, batch: int, rate: float, heads: int | None, layer: int) -> None:
    arguments = run_of(name)
    training = arguments.training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == batch
    assert (training.learning_rate, training.max_steps, training.warmup_steps) == (rate, 400_000, 4000)
    assert (arguments.objective.relation_heads, arguments.model.teacher_layer) == (heads, layer)
    assert arguments.data.max_length == 512


def test_the_assistant_is_as_deep_as_the_teacher_and_as_wide_as_the_student() -> None:
    model = run_of("minilm-v1-l3-h384-assistant").model
    assert (model.assistant_num_layers, model.assistant_hidden_size) == (12, 384)


def test_later_flags_override_a_recipe_wherever_it_stands() -> None:
    for argv in (
        ["--recipe", "minilm-v2-l6-h384", "--max_steps", "7"],
        ["--max_steps=7", "--recipe=minilm-v2-l6-h384"],
    ):
        arguments = parse([*argv, "--output_dir", "out", "--data", "mine.txt"])
        assert (arguments.training.max_steps, arguments.data.data) == (7, ["mine.txt"])
        assert arguments.objective.relation_heads == 48


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("# Mine\n--teacher 'a b' # spaces\n\n--data x.txt y.txt\n")
    assert expand(["--recipe", str(file), "--seed", "3"]) == [
        "--teacher",
        "a b",
        "--data",
        "x.txt",
        "y.txt",
        "--seed",
        "3",
    ]
    file.write_text("--recipe minilm-v2-l6-h384")
    with pytest.raises(ValueError, match="names another one with --recipe: write its flags out"):
        expand(["--recipe", str(file)])
    file.write_bytes(b"--teacher \xff")
    with pytest.raises(ValueError, match=r"cannot read the recipe .*mine.txt': it is no text in UTF-8"):
        expand(["--recipe", str(file)])
    file.write_text("--teacher 'a b")
    with pytest.raises(ValueError, match=r"cannot read the recipe .*mine.txt': No closing quotation"):
        expand(["--recipe", str(file)])


def test_what_is_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="there is no recipe or file 'minilm-v3'; the recipes: minilm-v1-l12-h384, "):
        expand(["--recipe", "minilm-v3"])
    with pytest.raises(ValueError, match="there is no recipe or file ''"):
        expand(["--recipe"])
    with pytest.raises(ValueError, match="one --recipe at a time, got a and b"):
        expand(["--recipe", "a", "--recipe=b"])


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--list_recipes"])
    assert end.value.code == 0
    printed = capsys.readouterr().out.strip()
    assert printed == listing()
    assert [line.split()[0] for line in printed.splitlines()] == names()
    assert "MiniLMv2, 6x384 from BERT-base" in printed
