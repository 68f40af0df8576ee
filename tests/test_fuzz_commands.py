"""A slice of what `fuzz_commands.py` calls, the same in every run, and the faults that it has found, by name."""

import json
import sys
from argparse import Action, ArgumentTypeError
from pathlib import Path

import pytest
from conftest import CommandLine
from fuzz_commands import FLAGS, draw
from judged_calls import Case, run, sandbox
from test_evaluate import Run
from test_evaluate import evaluation as evaluation

from minilm.cli.terminal import OneLineErrors, positive
from minilm.data.reading import DataError
from minilm.data.records import read_vectors

SEED, FIRST, CALLS = 11, 0, 60
TRAINED = ["--student_num_layers", "1", "--max_steps", "2", "--use_cpu", "--dry_run"]


def test_a_slice_of_the_calls_ends_as_it_should() -> None:
    with sandbox() as box:
        for number in range(FIRST, FIRST + CALLS):
            case = draw(number, SEED, box)
            told, faults = run(case, box)
            assert not faults, (case, told, faults)


def test_faults_are_seen() -> None:
    """A command that does nothing, one that says nothing, one with a page, one that changes an input."""
    with sandbox() as box, pytest.MonkeyPatch.context() as patch:

        def told(argv: list[str], act: object) -> str:
            patch.setitem(run.__globals__["MAINS"], "minilm-train", act)
            box.here.mkdir(exist_ok=True)
            return " ".join(run(Case("minilm-train", argv, ""), box)[1])

        assert "nothing was done" in told([], lambda _: 0)
        assert "0 lines of error" in told([], lambda _: 2)
        assert "exit code 3" in told([], lambda _: 3)
        assert "ZeroDivisionError" in told([], lambda _: 1 // 0)
        page = "minilm-train: error: " + "a" * 5000
        assert "an error of 5021 letters" in told([], lambda _: print(page, file=sys.stderr) or 1)
        assert "control characters" in told([], lambda _: print("minilm-train: error: \x1b", file=sys.stderr) or 1)
        assert "changed" in told([], lambda _: (box.inputs / "good.txt").write_text("") or 2)
        assert "code of the inputs was run" in told([], lambda _: (box.here / "code-was-run").touch() or 2)


def test_flags_come_from_the_parsers() -> None:
    def names(actions: list[Action]) -> set[str]:
        return {action.dest for action in actions}

    assert {"teacher", "student_num_layers", "relations", "learning_rate", "deepspeed"} <= names(FLAGS["minilm-train"])
    assert {"tasks", "protocol", "bf16"} <= names(FLAGS["minilm-eval"])
    assert {"samples", "glove"} <= names(FLAGS["minilm-augment"])


def test_no_value_is_taken_for_an_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneLineErrors(prog="minilm-eval")
    parser.add_argument("--data_dir", type=Path)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--data_dir=--"])
    assert capsys.readouterr().err == "minilm-eval: error: argument --data_dir: '--' is no value\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", "[" * 200_000, "cannot read 'a.jsonl' at row 1: its JSON is nested too deeply"),
        ("saved/dataset_dict.json", "[]", "'saved/dataset_dict.json' is not what `save_to_disk` writes (TypeError: "),
        ("saved/dataset_dict.json", "{}", "is not what `save_to_disk` writes (KeyError: 'splits')"),
    ],
)
def test_data_that_are_no_records(command: CommandLine, teacher: str, name: str, content: str, told: str) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    code, _, err = command("--teacher", teacher, "--data", path.parts[0], "--output_dir", "out", *TRAINED)
    assert (code, err.count("\n")) == (2, 1), err
    assert told in err


def test_a_report_to_nothing_that_is_known(command: CommandLine, teacher: str, data: str) -> None:
    argv = ["--teacher", teacher, "--data", data, "--output_dir", "out", *TRAINED]
    code, _, err = command(*argv, "--report_to", "x")
    assert (code, err.count("\n")) == (2, 1), err
    assert "report_to=['x']: x is not supported, only " in err


@pytest.mark.parametrize("value", [10**19, {"a": 1}, [1]])
def test_a_config_with_something_else_under_a_name(
    command: CommandLine, teacher: str, data: str, value: object
) -> None:
    path = Path(teacher) / "config.json"
    config = json.loads(path.read_text())
    for name in ("architectures", "model_type", "hidden_size"):
        path.write_text(json.dumps(config | {name: value}))
        argv = ["--teacher", teacher, "--data", data, "--output_dir", "out", *TRAINED]
        code, _, err = command(*argv, "--output_weight", "1")
        assert (code, err.count("\n")) == (2, 1), err
        assert "cannot load the teacher" in err or "no trained head" in err


@pytest.mark.parametrize(
    ("content", "flags", "told"),
    [
        ("text,text,label\na,b,1\n", [], "'data/own/train.csv' has two columns 'text'"),
        (
            "text,label\na,1\n",
            ["--form", "tokens"],
            "--form tokens needs a list of labels in each record: the column 'label'",
        ),
    ],
)
def test_task_data_that_are_none(evaluation: Run, teacher: str, content: str, flags: list[str], told: str) -> None:
    Path("data/own").mkdir()
    for split in ("train", "validation"):
        Path(f"data/own/{split}.csv").write_text(content)
    code, _, err = evaluation(teacher, "--tasks", "own", *flags)
    assert code in (1, 2)
    assert told in err
    assert err.count("\n") == 1


def test_task_data_without_records(evaluation: Run, teacher: str) -> None:
    Path("data/own").mkdir()
    Path("data/own/train.jsonl").write_text('"text"\n1\n')
    code, _, err = evaluation(teacher, "--tasks", "own")
    assert (code, err.count("\n")) == (1, 1), err
    assert "'data/own/train.jsonl' holds 'text', which is no record with columns" in err


def test_a_model_that_takes_no_text(evaluation: Run, teacher: str) -> None:
    path = Path(teacher) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": -0.5}))
    code, _, err = evaluation(teacher, "--tasks", "sst2")
    assert code == 2
    assert err.splitlines()[-1].startswith("minilm-eval: error: cannot load the model ")
    assert "Traceback" not in err


def test_more_layers_than_could_be_made(command: CommandLine, evaluation: Run, teacher: str, data: str) -> None:
    path = Path(teacher) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**12}))
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *TRAINED)
    assert (code, err.count("\n")) == (2, 1), err
    assert "its config has 1000000000000 layers, and no model more than 10000" in err
    code, _, err = evaluation(teacher, "--tasks", "sst2")
    assert code == 2
    assert "its config has 1000000000000 layers, and no model more than 10000" in err


def test_an_unknown_token_that_is_unknown(command: CommandLine, teacher: str, data: str) -> None:
    path = Path(teacher) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": ""}))
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *TRAINED)
    assert (code, err.count("\n")) == (2, 1), err
    assert "does not know its special tokens: maximum recursion depth exceeded" in err


def test_bfloat16_without_a_gpu(evaluation: Run, teacher: str) -> None:
    argv = ["--tasks", "sst2", "--protocol", "quick", "--max_train_records", "2", "--max_length", "8", "--bf16"]
    code, out, err = evaluation(teacher, *argv)
    assert code == 0, err
    assert "| teacher " in out


def test_noise_of_nothing_and_numbers_beyond_the_machines(command: CommandLine, teacher: str, data: str) -> None:
    argv = ["--teacher", teacher, "--data", data, "--output_dir", "out", *TRAINED]
    code, _, err = command(*argv, "--neftune_noise_alpha", "0")
    assert (code, err.count("\n")) == (2, 1), err
    assert "neftune_noise_alpha=0.0 is not supported" in err
    assert positive(str(2**63 - 1)) == 2**63 - 1
    with pytest.raises(ArgumentTypeError, match="'9223372036854775808' is more than 9223372036854775807"):
        positive(str(2**63))


def test_a_device_is_no_file() -> None:
    with pytest.raises(DataError, match="cannot read '/dev/zero' at row 1: it is a device, not a file"):
        read_vectors(Path("/dev/zero"))


def test_names_that_the_system_does_not_take(command: CommandLine, teacher: str, data: str) -> None:
    def ending(*argv: str) -> str:
        code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *TRAINED, *argv)
        assert (code, err.count("\n")) == (2, 1), err
        return err

    assert "there is no such file" in ending("--accelerator_config", "a" * 100_000)
    assert "there is no recipe or file" in ending("--recipe", "a" * 100_000)
    Path("nul.txt").write_text("--output_dir a\0b")
    assert "the argument 'a\\x00b' is no text" in ending("--recipe", "nul.txt")
