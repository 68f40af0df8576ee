"""Teacher, assistant, student in one command; and dry runs."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import CommandLine
from transformers import AutoModel

from minilm.cli.arguments import parse
from minilm.cli.stages import stages
from minilm.training.runs import OccupiedError

RUN = [
    *("--student_num_layers", "2", "--student_hidden_size", "16"),
    *("--max_length", "12", "--max_steps", "4", "--per_device_train_batch_size", "4"),
    *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
    *("--logging_steps", "2", "--save_steps", "2"),
]
CHAIN = [*RUN, "--assistant_num_layers", "3", "--assistant_hidden_size", "16"]


def asked(*flags: str) -> list[str]:
    return ["--teacher", "t", "--data", "d.txt", "--output_dir", "out", *CHAIN, *flags]


def test_without_an_assistant_there_is_one_run() -> None:
    arguments = parse(["--teacher", "t", "--data", "d.txt", "--output_dir", "out", *RUN])
    assert stages(arguments) == [arguments]


def test_the_assistant_learns_first_and_teaches_then() -> None:
    first, second = stages(parse(asked("--teacher_layer", "3", "--objective", "minilm-v2", "--student_init", "layers")))
    assert (first.model.teacher, first.model.teacher_layer) == ("t", 3)
    assert (first.model.student_num_layers, first.model.student_hidden_size) == (3, 16)
    assert (second.model.teacher, second.model.teacher_layer) == (str(Path("out/assistant")), -1)
    assert (second.model.student_num_layers, second.model.student_hidden_size) == (2, 16)
    assert [run.training.output_dir for run in (first, second)] == [str(Path("out/assistant")), "out"]
    assert {run.objective.objective for run in (first, second)} == {"minilm-v2"}
    dims = [run.model.student_embedding_dim for run in stages(parse(asked("--student_embedding_dim", "8")))]
    assert dims == [None, 8]
    assert (first.model.student_init, second.model.student_init) == ("auto", "layers")
    named = [run.model.student_init_layers for run in stages(parse(asked("--student_init_layers", "1,3")))]
    assert named == [None, "1,3"]  # of the assistant


def test_an_assistant_has_the_sizes_that_it_is_given_where_the_student_goes_on_from_a_folder() -> None:
    sizes = ["--assistant_num_layers", "3", "--max_steps", "4"]
    argv = ["--teacher", "t", "--data", "d.txt", "--output_dir", "out", "--student", "s", *sizes]
    first, second = stages(parse(argv))
    assert (first.model.student, second.model.student) == (None, "s")


def test_a_finished_assistant_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside, outside = str(Path("out/assistant/checkpoint-2")), str(Path("out/checkpoint-2"))

    def resumed(checkpoint: str) -> list[tuple[str, str | None]]:
        runs = stages(parse(asked("--resume_from_checkpoint", checkpoint)))
        return [(str(run.training.output_dir), run.training.resume_from_checkpoint) for run in runs]

    assistant = str(Path("out/assistant"))
    assert resumed("auto") == [(assistant, "auto"), ("out", "auto")]
    assert resumed(inside) == [(assistant, inside), ("out", None)]
    with pytest.raises(ValueError, match=r"checkpoint-2' is a checkpoint of the student, and .* no finished assistant"):
        resumed(outside)
    Path("out/assistant").mkdir(parents=True)
    first = stages(parse(asked()))[0]
    saved = {"arguments": asdict(first.model) | asdict(first.objective) | asdict(first.data)}
    Path("out/assistant/metrics.json").write_text(json.dumps(saved))
    assert resumed("auto") == [("out", "auto")]
    assert resumed(outside) == [("out", outside)]
    with pytest.raises(OccupiedError, match=r"out holds a finished assistant and no finished student: add --resume"):
        stages(parse(asked()))


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--teacher", "other", r"its teacher is 't', this run's is 'other'"),
        ("--assistant_num_layers", "4", r"its student_num_layers is 3, this run's is 4"),
        ("--objective", "minilm-v2", r"its objective is 'minilm', this run's is 'minilm-v2'"),
        ("--data", "e.txt", r"its data is \['d.txt'\], this run's is \['e.txt'\]"),
    ],
)
def test_a_finished_assistant_of_another_run_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    first = stages(parse(asked()))[0]
    Path("out/assistant").mkdir(parents=True)
    saved = {"arguments": asdict(first.model) | asdict(first.objective) | asdict(first.data)}
    Path("out/assistant/metrics.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"assistant belongs to another run: {told}"):
        stages(parse(asked("--resume_from_checkpoint", "auto", flag, value)))


def test_a_chain_leaves_both_models_and_says_what_taught_whom(command: CommandLine, teacher: str, data: str) -> None:
    code, out, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *CHAIN)
    assert (code, err) == (0, "")
    sizes = {}
    for folder in ("out/assistant", "out"):
        config = AutoModel.from_pretrained(folder).config
        sizes[folder] = (config.num_hidden_layers, config.hidden_size)
        assert json.loads(Path(folder, "metrics.json").read_text())["steps"] == 4
    assert sizes == {"out/assistant": (3, 16), "out": (2, 16)}
    assert json.loads(Path("out/metrics.json").read_text())["teacher"]["name"] == str(Path("out/assistant"))
    assert "hint" not in out

    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *CHAIN)
    assert code == 1
    assert "out holds a finished run" in err
    Path("out/metrics.json").unlink()
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *CHAIN)
    assert code == 1
    assert "out holds an unfinished run (checkpoint-4): add --resume_from_checkpoint auto" in err


def test_what_the_student_cannot_be_shows_before_the_assistant_is_trained(
    command: CommandLine, teacher: str, data: str
) -> None:
    wrong = [*CHAIN, "--student_num_heads", "3"]
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *wrong)
    assert code == 2
    assert "hidden_size 16 is not divisible by num_heads 3" in err
    assert not Path("out").exists()


def test_an_occupied_folder_of_the_student_shows_before_the_assistant_is_trained(
    command: CommandLine, teacher: str, data: str
) -> None:
    Path("out").mkdir()
    Path("out/config.json").write_text("{}")
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *CHAIN)
    assert (code, err) == (1, "minilm-train: error: out holds a model already: choose another --output_dir\n")
    assert not Path("out/assistant").exists()


def test_a_dry_run_refuses_what_the_run_would(command: CommandLine, teacher: str, data: str) -> None:
    best = ["--load_best_model_at_end", "--save_strategy", "no", "--dry_run"]
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *RUN, *best)
    assert code == 2
    assert "load_best_model_at_end needs eval_strategy 'steps' or 'epoch'" in err


def test_the_rule_of_the_paper_is_a_hint(command: CommandLine, teacher: str, data: str) -> None:
    _, out, _ = command("--teacher", teacher, "--data", data, "--output_dir", "out", *RUN)
    assert "hint       at most half the teacher's layers and width: " in out
    assert "--assistant_num_layers 4 --assistant_hidden_size 16 (MiniLM, section 3.4)" in out
    assert "hint       relations leave what lies above them as it starts: " in out


@pytest.mark.parametrize("chain", [False, True])
def test_a_dry_run_takes_three_steps_and_leaves_nothing(
    command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch, chain: bool
) -> None:
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: (steps.append(1), step(*args, **kwargs))[1])
    here = {*Path().iterdir(), Path("cache")}
    flags = [*(CHAIN if chain else RUN), "--max_steps", "1000", "--dry_run"]
    code, out, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *flags)
    assert (code, err) == (0, "")
    assert len(steps) == 3
    assert set(Path().iterdir()) == here
    assert re.search(r"^student    [23] layers x 16, 4 heads, \S+ parameters", out, re.MULTILINE)
    memory = re.search(r"^memory     ([\d.]+) GiB of main memory at its peak", out, re.MULTILINE)
    assert memory
    assert 0.1 < float(memory[1]) < 20
    pace = re.search(r"^time       (\S+) s a step, (\S+) (seconds|minutes|hours) for 1,000 of them", out, re.MULTILINE)
    assert pace
    seconds = float(pace[2]) * {"seconds": 1, "minutes": 60, "hours": 3600}[pace[3]]
    assert seconds == pytest.approx(1000 * float(pace[1]), rel=0.1, abs=31)


def test_a_map_of_layers_is_of_one_teacher(command: CommandLine, teacher: str, data: str) -> None:
    flags = [*CHAIN, "--layer_map", "1:2,2:4"]
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *flags)
    assert code == 2
    assert "--layer_map 1:2,2:4 names layers of one teacher, and an assistant is another" in err


def test_the_demonstrations_teacher_is_no_classifier(command: CommandLine) -> None:
    code, _, err = command("--objective", "tinybert-task", "--use_cpu")
    assert code == 2
    assert "no trained head" in err
    assert err.count("\n") == 1


def test_a_first_run_that_an_earlier_version_has_finished_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = stages(parse(asked()))[0]
    Path("out/assistant").mkdir(parents=True)
    saved = {"arguments": {"objective": first.objective.objective}}  # before the other flags were there
    Path("out/assistant/metrics.json").write_text(json.dumps(saved))
    assert len(stages(parse(asked("--resume_from_checkpoint", "auto")))) == 1
