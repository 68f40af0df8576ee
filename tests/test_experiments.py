"""The experiments' own logic on tiny models: which cells there are, what they run, how the loop goes on, the tables."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_text import lines, save_teacher
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import _cells
import experiments
import masked_lm_head
import sentences
from _cells import Sources, make, training_flags
from _curves import BF16, FP32, REFERENCE, STEPS, CurveRow, curves, losses, table_of_curves
from _experiments import (
    COMPARISONS,
    ENDS,
    FEWER,
    HALF,
    LAYERS,
    PCA,
    QUICK,
    RANDOM,
    SLICE,
    SYSTEMS,
    WHOLE,
    Cell,
    Comparison,
)
from _report import DOCUMENT, TASKS, ExperimentRow, table, values_by_line, write_report
from _results import RESULTS, read_csv

from minilm.cli.arguments import parse
from minilm.objectives.systems import SYSTEMS as OBJECTIVES

SMALL = Comparison(
    "Small", (("teacher", "6x384", "", 0), ("untrained", WHOLE, RANDOM, 0), ("minilm", WHOLE, LAYERS, 2))
)


def rows(cell: Cell, values: dict[str, float]) -> list[ExperimentRow]:
    return [ExperimentRow.of(cell, Path("wiki/texts.parquet"), task, value, "abc") for task, value in values.items()]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict({"text": lines(700)}).to_parquet(path)
    return str(path)


def test_cells_come_seed_by_seed_and_what_draws_nothing_once() -> None:
    minilm, random = [("minilm", WHOLE, LAYERS, 2, seed) for seed in (1, 2)], ("untrained", WHOLE, RANDOM, 0)
    expected = [Cell("teacher", "6x384", "", 0, 1), Cell(*random, 1), Cell(*minilm[0]), Cell(*random, 2)]
    assert list(SMALL.cells((1, 2))) == [*expected, Cell(*minilm[1])]


def test_every_run_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    sources = Sources("t", "t-mlm", "d.parquet", tmp_path)
    cells = [cell for comparison in [*COMPARISONS.values(), QUICK] for cell in comparison.cells((1, 2, 3))]
    trained = [cell for cell in cells if SYSTEMS[cell.system].way == "train"]
    assert len(trained) > 60
    for cell in trained:
        arguments = parse(training_flags(cell, sources))
        system = OBJECTIVES[arguments.objective.objective]
        assert (arguments.model.teacher == "t-mlm") == (system.head or arguments.objective.output_weight > 0)
        assert arguments.training.seed == cell.seed
        sizes = {WHOLE: (None, None), HALF: (192, None), FEWER: (192, 6)}[cell.student]
        assert (arguments.model.student_hidden_size, arguments.model.student_num_heads) == sizes
    assert len({cell.name for cell in cells}) == len(set(cells))


def test_a_stopped_loop_makes_only_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Cell] = []

    def fake(cell: Cell, sources: Sources) -> str:
        made.append(cell)
        if cell.seed == 2 and cell.system == "minilm" and len(made) < 6:
            raise RuntimeError("killed")
        return cell.name

    monkeypatch.setattr(experiments, "COMPARISONS", {"systems": SMALL})
    monkeypatch.setattr(experiments, "make", fake)
    monkeypatch.setattr(experiments, "read_tasks", lambda folder: None)
    monkeypatch.setattr(experiments, "scores", lambda model, tasks: dict.fromkeys(TASKS, 50.0 + len(model)))
    drawn = [CurveRow(system="minilm", student=WHOLE, start=LAYERS, steps=2, seed=1, step=1, loss=1 / 3, commit="abc")]
    monkeypatch.setattr(experiments, "curves", lambda commits, work: drawn if len(commits) == 5 else [])
    paths = ["--teacher", "t", "--data", "d", "--tasks", "x", "--work", str(tmp_path), "--out", str(tmp_path)]
    assert experiments.main([*paths, "--seeds", "2"]) == 1
    assert "minilm_3x384_layers_2_4_6_2_2: killed" in capsys.readouterr().err
    assert len(made) == 5
    assert experiments.main([*paths, "--seeds", "2"]) == 0
    assert made[5:] == [Cell("minilm", WHOLE, LAYERS, 2, 2)]
    measured = read_csv(ExperimentRow, tmp_path / "experiments.csv")
    assert len(measured) == 5 * len(TASKS)
    assert [row.loss for row in read_csv(CurveRow, tmp_path / "experiments_curves.csv")] == [0.33333333]
    assert experiments.main([*paths, "--seeds", "3", "--only", "untrained"]) == 0
    assert made[6:] == [Cell("untrained", WHOLE, RANDOM, 0, 3)]
    assert experiments.main([*paths, "--seeds", "3", "--max_steps", "1"]) == 0
    assert len(made) == 7
    with pytest.raises(SystemExit):
        experiments.main(paths[2:])
    assert "--teacher is missing" in capsys.readouterr().err


def test_a_line_is_the_mean_and_spread_over_its_seeds() -> None:
    first, second = (dict(zip(TASKS, numbers, strict=True)) for numbers in ((80.0, 70, 60), (82.0, 71, 60)))
    minilm = [rows(Cell("minilm", WHOLE, LAYERS, 2, seed), found) for seed, found in ((2, second), (1, first))]
    half_done = rows(Cell("untrained", WHOLE, RANDOM, 0, 1), {"stsb": 1.0})
    values = values_by_line([*minilm[0], *minilm[1], *half_done])
    assert values == {
        ("minilm", WHOLE, LAYERS, 2): {
            **{task: [first[task], second[task]] for task in TASKS},
            "mean": [70.0, 71.0],
        }
    }
    line = table(SMALL, values).splitlines()[-1]
    spreads = " | ".join(
        f"{mean:.1f} ± {stdev(numbers):.1f}"
        for mean, numbers in ((81, (80, 82)), (70.5, (70, 71)), (60, (60, 60)), (70.5, (70, 71)))
    )
    assert line == f"| minilm | 3x384 | {LAYERS} | 2 | {spreads} | 2 |"


def test_curves_are_what_the_runs_logged_of_the_seeds_that_all_have(tmp_path: Path) -> None:
    logged = {(BF16, 1): (1.01, 0.49), (FP32, 1): (1.0, 0.5), (REFERENCE, 1): (1.0, 0.5001), (BF16, 3): (3.0, 3.0)}
    logged |= {(system, 2): (2.0, 1.0) for system in (BF16, FP32, REFERENCE)}
    cells = {Cell(system, WHOLE, LAYERS, STEPS, seed): values for (system, seed), values in logged.items()}
    others = [Cell(FP32, WHOLE, RANDOM, STEPS, 1), Cell("tinybert", WHOLE, LAYERS, STEPS, 1)]
    for cell, (first, second) in {**cells, **dict.fromkeys(others, (2.0, 2.0))}.items():
        folder = tmp_path / cell.name / f"checkpoint-{STEPS}"
        folder.mkdir(parents=True)
        entries = [{"step": 0, "eval_loss": 9.0}, {"step": 50, "loss": first}, {"step": 100, "loss": second}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    unfinished = Cell(BF16, WHOLE, LAYERS, STEPS, 4)
    found = list(curves(dict.fromkeys([*cells, *others, unfinished], "abc"), tmp_path))
    assert [(row.system, row.seed, row.step, row.loss) for row in found] == [
        (system, seed, step, loss)
        for (system, seed), values in logged.items()
        for step, loss in zip((50, 100), values, strict=True)
    ]
    assert {row.commit for row in found} == {"abc"}
    lines = table_of_curves(losses(found)).splitlines()[2:]
    assert lines == [
        "| 50 | 1.50500 | 1.50000 | 1.50000 | 0 % | 1 % | 2 |",
        "| 100 | 0.74500 | 0.75000 | 0.75005 | 0.02 % | 2 % | 2 |",
    ]


def test_starts_are_what_their_names_say(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", num_hidden_layers=6, hidden_size=384, num_attention_heads=12)
    sources = Sources(str(teacher), None, "", tmp_path)
    whole = AutoModel.from_pretrained(teacher).state_dict()

    def start(student: str, name: str) -> dict[str, torch.Tensor]:
        folder = make(Cell("untrained", student, name, 0, 1), sources)
        return {key: tensor for key, tensor in AutoModel.from_pretrained(folder).state_dict().items()}

    for name, taken in ((LAYERS, (1, 3, 5)), (ENDS, (0, 2, 5))):
        weights = start(WHOLE, name)
        for mine, theirs in enumerate(taken):
            key = "encoder.layer.{}.attention.self.query.weight"
            assert torch.equal(weights[key.format(mine)], whole[key.format(theirs)])
    assert start(HALF, PCA)["embeddings.word_embeddings.weight"].shape[1] == 192
    start(FEWER, SLICE)
    config = json.loads((tmp_path / Cell("untrained", FEWER, SLICE, 0, 1).name / "config.json").read_text())
    assert (config["num_attention_heads"], config["hidden_size"]) == (6, 192)
    bare = load_file(Path(make(Cell("embeddings, no layers", "0x384", "", 0, 1), sources), "model.safetensors"))
    assert torch.equal(bare["embeddings.word_embeddings.weight"], whole["embeddings.word_embeddings.weight"])
    assert not [name for name in bare if name.startswith("encoder")]


def test_a_run_that_fails_tells_its_last_line(tmp_path: Path) -> None:
    sources = Sources(str(tmp_path / "nothing"), None, str(tmp_path / "no.parquet"), tmp_path / "work")
    with pytest.raises(RuntimeError, match=r"minilm-train: error: .*nothing.* \(exit code 2, .*\.log\)"):
        make(Cell("minilm", WHOLE, LAYERS, 2, 1), sources)


def test_the_head_learns_and_the_encoder_stays(tmp_path: Path, texts: str) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    before, after = masked_lm_head.train_head(str(teacher), texts, str(tmp_path / "head"), 8, 16)
    assert after < before - 0.1
    old, new = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "head"))
    encoder = {name.removeprefix("bert."): tensor for name, tensor in new.items() if name.startswith("bert.")}
    assert len(encoder) > 60
    assert all(torch.equal(tensor, old[name]) for name, tensor in encoder.items())


def test_sentence_transformers_recipe_trains_the_layers_that_are_named(tmp_path: Path, texts: str) -> None:
    teacher, output = save_teacher(tmp_path / "teacher"), tmp_path / "out"
    script = Path(_cells.__file__).with_name("_embed_distill.py")
    subprocess.run([sys.executable, script, teacher, texts, output, "2,4", "cosine", "2", "1"], check=True)
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 2
    key = "encoder.layer.{}.output.dense.weight"
    old, new = (load_file(folder / "model.safetensors") for folder in (teacher, output))
    for mine, theirs in ((0, 1), (1, 3)):
        distance = (new[key.format(mine)] - old[key.format(theirs)]).abs().max()
        assert 0 < distance < 1e-2


def test_sentences_end_where_they_end() -> None:
    text = "This is the first sentence. And a second one, of 3.5 parts! Short. \nA line that ends here\n"
    expected = ["This is the first sentence.", "And a second one, of 3.5 parts!", "A line that ends here"]
    assert list(sentences.sentences([text])) == expected


def test_a_report_changes_only_what_stands_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    sections = [f"text before {name}\n<!-- {name} -->\n<!-- end of {name} -->\n" for name in (*COMPARISONS, "curves")]
    document.write_text("".join(sections) + "the end\n")
    measured = rows(Cell("minilm", WHOLE, LAYERS, 300, 1), dict.fromkeys(TASKS, 50.0))
    for _ in range(2):
        write_report(measured, [], document, tmp_path)
        told = document.read_text()
        assert told.count("| minilm | 3x384 | layers 2, 4, 6 | 300 |") == 2  # systems and starts
        assert [line for line in told.splitlines() if not line.startswith("|")] == "".join(
            [*sections, "the end"]
        ).splitlines()
    document.write_text(sections[0])
    with pytest.raises(ValueError, match="has no <!-- width --> with <!-- end of width --> behind it"):
        write_report(measured, [], document, tmp_path)


def test_the_tables_in_the_document_are_those_that_were_measured() -> None:
    values = values_by_line(read_csv(ExperimentRow, RESULTS / "experiments.csv"))
    document = DOCUMENT.read_text(encoding="utf-8")
    tables = {name: table(comparison, values) for name, comparison in COMPARISONS.items()}
    tables["curves"] = table_of_curves(losses(read_csv(CurveRow, RESULTS / "experiments_curves.csv")))
    for name, measured in tables.items():
        assert document.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0] == measured
    assert "".join(tables.values()).count("\n") > 25


def test_the_findings_in_the_readme_are_the_tables() -> None:
    values = values_by_line(read_csv(ExperimentRow, RESULTS / "experiments.csv"))
    readme = (DOCUMENT.parent / "README.md").read_text(encoding="utf-8")
    told = readme.split("<!-- findings -->\n")[1].split("<!-- end of findings -->")[0]
    layers, untrained = (WHOLE, LAYERS, 300), ("untrained", WHOLE, LAYERS, 0)
    others = ("distilbert", "mobilebert", "mlm-kd", "tinybert", "embedding")
    lines = [
        *((line, task) for line in (untrained, ("minilm", *layers)) for task in ("stsb", "mean")),
        *((("teacher", "6x384", "", 0), task) for task in ("stsb", "mean")),
        *(((name, *layers), "mean") for name in others),
        (("untrained", HALF, PCA, 0), "stsb"),
        *(((name, HALF, start, 300), "stsb") for start in (PCA, SLICE) for name in ("minilm", "minilm + embedding")),
    ]
    assert sorted(re.findall(r"\d\d\.\d", told)) == sorted(f"{mean(values[line][task]):.1f}" for line, task in lines)


def test_the_rule_in_the_readme_is_what_stands_highest() -> None:
    means = {
        line: mean(found["mean"])
        for line, found in values_by_line(read_csv(ExperimentRow, RESULTS / "experiments.csv")).items()
    }

    def best(table: str, student: str, steps: int) -> tuple[str, str]:
        lines = [line for line in COMPARISONS[table].lines if line[1] == student and line[3] == steps and line in means]
        assert len(lines) >= 3
        system, _, start, _ = max(lines, key=means.__getitem__)
        return system, start

    assert best("starts", WHOLE, 300) == best("starts", WHOLE, 1000) == ("minilm", LAYERS)
    assert best("starts", WHOLE, 0) == ("untrained", ENDS)
    assert best("width", HALF, 300) == ("minilm + embedding", PCA)
    assert best("heads", FEWER, 300) == ("minilm-v2 + embedding", PCA)
    assert abs(means["minilm", WHOLE, LAYERS, 1000] - means["minilm", WHOLE, LAYERS, 300]) < 0.5
    assert means["minilm", WHOLE, RANDOM, 1000] < means["minilm", WHOLE, LAYERS, 1000] - 5


def test_the_numbers_of_the_answers_are_those_of_the_tables() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    answers = document.split("## What they say")[1].split("\n## ")[0]
    told = re.findall(r"\d\d\.\d(?: ± \d\.\d)?", answers)
    cells = {cell.strip() for line in document.splitlines() if line.startswith("|") for cell in line.split("|")}
    assert len(told) > 20
    assert not [number for number in told if number not in cells | {cell.split(" ± ")[0] for cell in cells}]
