"""`minilm-train` from its arguments to the folder it leaves, and each mistake as one line and an exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import CommandLine
from tiny_models import tiny_model
from tiny_text import save_teacher, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertForMaskedLM, TrainerCallback, TrainingArguments

from minilm.training.runs import starting_point
from minilm.training.trainer import DistillationTrainer

FEW = ["--per_device_train_batch_size", "4", "--max_length", "12", "--logging_steps", "2", "--disable_tqdm", "true"]
SLICE = ["--student_init", "slice"]
SMALL = ["--student_num_layers", "2", "--max_steps", "4", *FEW, "--use_cpu"]


@pytest.mark.parametrize(
    ("flags", "relations", "heads"),
    [
        ([], ["qk", "vv"], None),
        (["--objective", "minilm-v2", "--student_hidden_size", "16"], ["qq", "kk", "vv"], 16),
        (["--relations", "qk:1,vq:0.5", "--teacher_layer", "2", "--implementation", "reference"], ["qk", "vq"], None),
    ],
)
def test_a_run_leaves_a_student_that_loads_and_its_report(
    command: CommandLine, teacher: str, data: str, flags: list[str], relations: list[str], heads: int | None
) -> None:
    code, out, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, *flags)
    assert (code, err) == (0, "")

    student = AutoModel.from_pretrained("out")
    assert student.config.num_hidden_layers == 2
    inputs = AutoTokenizer.from_pretrained("out")("some text", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [tiny_tokenizer()("some text")["input_ids"]]
    assert torch.isfinite(student(**inputs).last_hidden_state).all()

    metrics = json.loads(Path("out/metrics.json").read_text())
    assert list(metrics["heldout"]) == relations
    assert all(ends["start"] > 0 and ends["end"] > 0 for ends in metrics["heldout"].values())
    assert metrics["relation_heads"] == heads
    assert metrics["steps"] == 4
    assert metrics["parameters"]["teacher"]["total"] > metrics["parameters"]["student"]["total"]
    assert all(speed["tokens_per_second"] > 0 for speed in metrics["speeds"].values())
    assert metrics["arguments"]["teacher"] == teacher
    assert metrics["arguments"]["max_steps"] == 4
    assert metrics["data"] == {
        "name": data,
        "unit": "sequences",
        "train_sequences": 38,
        "heldout_sequences": 2,
        "max_length": 12,
        "packed": False,
        "sequences_per_step": 4,
    }
    assert Path("out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/report.md").read_text() in out


def test_training_lowers_the_heldout_losses(command: CommandLine, teacher: str, data: str) -> None:
    longer = ["--max_steps", "40", "--learning_rate", "3e-3", "--warmup_steps", "4"]
    code, _, _ = command("--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, *longer)
    assert code == 0
    for ends in json.loads(Path("out/metrics.json").read_text())["heldout"].values():
        assert ends["end"] < 0.9 * ends["start"]


def test_the_untrained_losses_are_those_of_the_students_start(command: CommandLine, teacher: str, data: str) -> None:
    """At a learning rate of 0 nothing changes, so start and end are the same held-out text and student."""
    command("--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, "--learning_rate", "0")
    for ends in json.loads(Path("out/metrics.json").read_text())["heldout"].values():
        assert ends["end"] == pytest.approx(ends["start"], rel=1e-6)


def test_a_decoder_is_distilled_with_causal_relations(
    command: CommandLine, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = []
    monkeypatch.setattr(
        DistillationTrainer, "train", lambda self, **_: causal.append(self.model.objective.causal) or 1 / 0
    )
    for family in ("bert", "llama"):
        folder = str(save_teacher(tmp_path / family, family))
        with pytest.raises(ZeroDivisionError):
            command("--teacher", folder, "--data", data, "--output_dir", f"out-{family}", *SMALL)
    assert causal == [False, True]


class StopAtTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == 2:
            raise KeyboardInterrupt


# transformers 5.0 warns where checkpoints are made within one tick of the clock.
@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, "--save_steps", "1"]
    initialise = DistillationTrainer.__init__

    def interrupted(self: DistillationTrainer, **options: object) -> None:
        initialise(self, **options)  # type: ignore[arg-type]
        self.add_callback(StopAtTwo())

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "__init__", interrupted)
        code, _, err = command(*arguments)
    assert code == 130
    assert "interrupted; --resume_from_checkpoint auto continues from the last checkpoint" in err

    code, _, err = command(*arguments)
    assert code == 1
    assert "out holds an unfinished run (checkpoint-1): add --resume_from_checkpoint auto" in err

    code, _, err = command(*arguments, "--resume_from_checkpoint", "auto", "--student_num_layers", "3")
    assert code == 2
    assert "belongs to another run: its student is {'layers': 2," in err

    for flag, value in (("relation_temperature", "2.0"), ("student_intermediate_size", "16"), ("seed", "7")):
        code, _, err = command(*arguments, "--resume_from_checkpoint", "auto", f"--{flag}", value)
        assert (code, err.count("\n")) == (2, 1)
        assert f"belongs to another run: its {flag} is " in err

    code, out, _ = command(*arguments, "--resume_from_checkpoint", "auto")
    assert code == 0
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert (metrics["steps"], metrics["steps_before_resuming"]) == (4, 1)
    assert "4 steps of 4 sequences" in out
    assert "the last 3" in out
    assert "out, continued after step 1" in out

    code, _, err = command(*arguments, "--resume_from_checkpoint", "auto")
    assert code == 1
    assert "out holds a finished run (see out/report.md)" in err


def test_a_resumed_run_reports_the_untrained_losses_of_its_first_start(
    command: CommandLine, teacher: str, data: str
) -> None:
    arguments = ["--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, "--save_steps", "4"]
    command(*arguments)
    first = json.loads(Path("out/metrics.json").read_text())
    Path("out/metrics.json").unlink()  # as if it had been killed while measuring speeds, after its last step
    assert command(*arguments, "--resume_from_checkpoint", "auto")[0] == 0
    second = json.loads(Path("out/metrics.json").read_text())
    for relation, ends in first["heldout"].items():
        assert second["heldout"][relation] == pytest.approx(ends, rel=1e-6)


def test_a_folder_that_holds_a_model_is_left_alone(command: CommandLine, teacher: str, data: str) -> None:
    before = Path(teacher, "model.safetensors").read_bytes()
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", teacher, *SMALL)
    assert code == 1
    assert "holds a model already: choose another --output_dir" in err
    assert Path(teacher, "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "curves.png"])
def test_a_file_that_the_run_would_overwrite_is_left_alone(
    command: CommandLine, teacher: str, data: str, name: str
) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_text("my own")
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "mine", *SMALL)
    assert (code, Path("mine", name).read_text()) == (1, "my own")
    assert f"mine holds a {name}, which the run would overwrite: choose another --output_dir" in err


def test_a_run_without_a_single_batch_is_refused(command: CommandLine, teacher: str, data: str) -> None:
    flags = [*SMALL, "--dataloader_drop_last", "true", "--per_device_train_batch_size", "5000"]
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *flags)
    assert code == 2
    assert re.search(r"dataloader_drop_last drops all \d+ sequences: they make no batch of 5000", err)
    assert not Path("out").exists()


def test_an_output_folder_that_is_a_file_is_one_line(command: CommandLine, teacher: str, data: str) -> None:
    Path("taken").write_text("my own")
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "taken", *SMALL)
    assert (code, err.count("\n")) == (1, 1)
    assert "taken" in err
    assert Path("taken").read_text() == "my own"


def test_a_fault_of_our_own_is_no_mistake_of_the_users(
    command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> NoReturn:
        raise ValueError("a fault")

    monkeypatch.setattr("minilm.cli.distill.load_inputs", broken)
    with pytest.raises(ValueError, match="a fault"):
        command("--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL)


def test_mistakes_are_one_line_and_exit_code_2(command: CommandLine, teacher: str, data: str) -> None:
    rest = ["--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL]

    Path("a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    def fails(message: str, *argv: str) -> None:
        code, _, err = command(*argv)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
        assert not Path("out").exists()

    fails("unknown argument --teachr, did you mean --teacher?", "--teachr", teacher)
    fails("unknown argument --teach,", "--teach", teacher)  # no abbreviations
    fails("argument --objective: invalid choice: 'minilm-v3' (choose from", *rest, "--objective", "minilm-v3")
    fails("invalid int value: 'many'", *rest, "--max_steps", "many")
    fails("logging_steps", *rest, "--logging_steps", "0")
    fails("--data is given without --teacher", "--data", data)
    fails("--teacher is given without --data", "--teacher", teacher)
    fails("--streaming is given without --data", "--streaming")
    fails("--data_weights is given without --data", "--data_weights", "1", "2")
    fails("--data_weights has 2 numbers for 1 --data", *rest, "--data_weights", "1", "2")
    fails("--streaming needs --max_steps, which is -1: a stream has no end", *rest, "--max_steps", "-1", "--streaming")
    fails("--output_weight is -1.0: it must be finite and not negative", *rest, "--output_weight", "-1")
    fails("--output_weight is nan: it must be finite and not negative", *rest, "--output_weight", "nan")
    fails("--relation_temperature is inf: it must be finite and pos", *rest, "--relation_temperature", "inf")
    fails("has no trained head (it was saved as BertModel): leave out --output_weight", *rest, "--output_weight", "1")
    fails("--output_temperature is 0.0: it must be finite and positive", *rest, "--output_temperature", "0")
    fails("there is no recipe or file 'minilm-v3'", *rest, "--recipe", "minilm-v3")
    fails("init 'slice' cannot widen hidden_size from 32 to 64", *rest, "--student_hidden_size", "64", *SLICE)
    fails("--output_dir is missing", "--teacher", teacher, "--data", data)
    fails("the student's size is missing", "--teacher", teacher, "--data", data, "--output_dir", "out")

    fails("cannot load the teacher 'no/such', which is no folder here, from the hub", *rest, "--teacher", "no/such")
    fails("there is no file or folder 'missing.txt'", *rest, "--data", "missing.txt")
    fails(
        "has no column 'body'; choose with --text_column from ['text']",
        *rest,
        "--data",
        "a.jsonl",
        "--text_column",
        "body",
    )
    fails("layer 9 does not exist: layers are 1 to 4", *rest, "--teacher_layer", "9")
    fails("max_length 65 is more than the teacher's 64 positions", *rest, "--max_length", "65")
    fails("max_length 2 leaves no room beside the tokenizer's 2 special tokens", *rest, "--max_length", "2")
    fails("unknown relation 'qz'", *rest, "--relations", "qz")
    fails("relation 'qk' stands twice", *rest, "--relations", "qk,qk")
    fails("the weight 'x' of relation 'qk'", *rest, "--relations", "qk:x")
    fails(
        "5 relation heads do not divide the teacher's width 32 and the student's 32; choose",
        *rest,
        "--relation_heads",
        "5",
    )
    fails("heads", *rest, "--student_num_heads", "2")
    fails("hidden_size 30 is not divisible by num_heads 4", *rest, "--student_hidden_size", "30")
    fails("is no complete checkpoint", *rest, "--resume_from_checkpoint", "nowhere")


def test_values_that_no_flag_takes(command: CommandLine, teacher: str, data: str) -> None:
    rest = ["--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL]
    Path("a.txt").write_text("some text")

    def fails(message: str, *argv: str) -> None:
        code, _, err = command(*rest, *argv)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
        assert not Path("out").exists()

    for flag in ("teacher", "data", "output_dir", "relations", "resume_from_checkpoint", "text_column", "run_name"):
        fails(f"--{flag} is empty: give it a value, or leave it out", f"--{flag}", "")
    fails("--data is empty", "--data", data, " ")
    fails("--learning_rate is inf: it must be finite and not negative", "--learning_rate", "1e400")
    fails("--weight_decay is nan: it must be finite and not negative", "--weight_decay", "nan")
    fails("--gradient_accumulation_steps is 0: it must be at least 1", "--gradient_accumulation_steps", "0")
    fails("--gradient_accumulation_steps is -1: it must be at least 1", "--gradient_accumulation_steps", "-1")
    fails("--max_steps is 0: it must be at least 1, or -1 to go by num_train_epochs", "--max_steps", "0")
    fails("--data_weights is 1e+308: it must be at most 3.4", "--data", data, data, "--data_weights", "1e308", "1e308")
    fails("--relation_temperature is 1e-300: it must lie between", "--relation_temperature", "1e-300")
    fails("the weight 1e300 of relation 'qk' must be at most 3.402823e+38", "--relations", "qk:1e300")
    fails("the weight '' of relation 'qk' in 'qk:' is no number", "--relations", "qk:")
    fails("the weight of relation 'qk' must be finite", "--relations", "qk:nan")
    fails("--do_train false cannot be had: minilm-train trains and evaluates", "--do_train", "false")
    fails("--do_eval false cannot be had", "--do_eval", "false")
    fails("--do_predict true cannot be had", "--do_predict")
    fails("--deepspeed is 'none.json': there is no such file", "--deepspeed", "none.json")
    fails("--fsdp_config is 'a.txt', which cannot be read as JSON: Expecting value", "--fsdp_config", "a.txt")
    fails("""--lr_scheduler_kwargs is '{"x"', which cannot be read as JSON""", "--lr_scheduler_kwargs", '{"x"')
    fails("which cannot be read as JSON: NaN is no number in JSON", "--lr_scheduler_kwargs", '{"min_lr": NaN}')
    fails("""is 'x': it must be JSON, as in '{"name": 1}'""", "--lr_scheduler_kwargs", "x")
    fails("TypeError: AcceleratorConfig.__init__() got an unexpected", "--accelerator_config", '{"foo": 1}')
    fails("At most one of fp16 and bf16", "--bf16", "--fp16")
    fails("label_names=['a'] means nothing here: there are no labels", "--label_names", "a")
    fails("use_liger_kernel=True is not supported", "--use_liger_kernel")
    fails(
        "has no effect here: accelerate shards a student over several GPUs, not over 1 process on c",
        "--fsdp",
        "offload",
    )
    fails("debug='underflow_overflow' is not supported", "--debug", "underflow_overflow")
    fails("is no text in utf-8: rename what it names", "--run_name", b"a\xff".decode("utf-8", "surrogateescape"))


def test_the_modes_that_a_run_has_may_be_named(command: CommandLine, teacher: str, data: str) -> None:
    argv = ["--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, "--dry_run"]
    assert command(*argv, "--do_train", "--do_eval", "true", "--do_predict", "false")[0] == 0


def test_a_teacher_without_all_its_weights_or_tokens_is_refused(
    command: CommandLine, tmp_path: Path, data: str
) -> None:
    deep = Path(save_teacher(tmp_path / "deep"))
    config = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    code, _, err = command("--teacher", str(deep), "--data", data, "--output_dir", "out", *SMALL)
    assert code == 2
    assert "lack 16 of its tensors, encoder.layer.4." in err

    few = str(save_teacher(tmp_path / "few", vocab_size=50))
    code, _, err = command("--teacher", few, "--data", data, "--output_dir", "out", *SMALL)
    assert code == 2
    assert "has 57 tokens, the model embeds 50" in err


def test_roberta_takes_as_many_tokens_as_its_positions_leave(command: CommandLine, tmp_path: Path, data: str) -> None:
    teacher = str(save_teacher(tmp_path / "roberta", "roberta"))
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, "--max_length", "64")
    assert code == 2
    assert "max_length 64 is more than the teacher's 63 positions" in err


def test_help_names_the_own_flags_first_and_all_of_the_trainers(command: CommandLine) -> None:
    code, out, _ = command("--help")
    assert code == 0
    headings = ["teacher and student:", "data:", "objective:", "training (transformers.TrainingArguments):"]
    places = [out.index(heading) for heading in headings]
    assert places == sorted(places)
    assert out.index("--teacher ") < out.index("--learning_rate")
    for name in TrainingArguments.__dataclass_fields__:
        if TrainingArguments.__dataclass_fields__[name].init:
            assert f"--{name}" in out
    assert "(default: None)" not in out


@pytest.mark.parametrize("flag", ["--help", "--list_recipes", "--no_such_flag"])
def test_what_ends_before_a_run_loads_no_models(flag: str) -> None:
    told = f"import sys\nfrom minilm.cli import main\ntry:\n    main([{flag!r}])\nexcept SystemExit:\n    pass\n"
    heavy = "{'transformers.modeling_utils', 'minilm.objectives.systems', 'datasets'} & sys.modules.keys()"
    code = f"{told}print({heavy}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "set()"


def test_the_module_is_light_and_missing_packages_are_one_line(tmp_path: Path) -> None:
    """In a process of its own, where transformers is not importable."""
    script = (
        "import sys\n"
        "from importlib import util\n"
        "import minilm.cli\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "found = util.find_spec\n"
        "minilm.cli.terminal.find_spec = lambda name: None if name == 'datasets' else found(name)\n"
        "sys.exit(minilm.cli.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "minilm-train: error: datasets not installed: pip install 'fused-minilm[train]'\n"


def test_the_seed_makes_the_student(command: CommandLine, teacher: str, data: str) -> None:
    random = ["--student_init", "random", "--learning_rate", "0", "--max_steps", "1"]
    for output, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        command("--teacher", teacher, "--data", data, "--output_dir", output, *SMALL, *random, "--seed", seed)
    a, b, c = (Path(output, "model.safetensors").read_bytes() for output in "abc")
    assert a == b
    assert a != c


def test_what_a_teachers_weights_lack_is_drawn_alike_each_time(command: CommandLine, tmp_path: Path, data: str) -> None:
    """A masked LM has no pooler. Were it another one each time, no checkpoint could be continued from."""
    BertForMaskedLM(tiny_model("bert").config).save_pretrained(tmp_path / "masked-lm")
    tiny_tokenizer().save_pretrained(tmp_path / "masked-lm")
    arguments = ["--teacher", str(tmp_path / "masked-lm"), "--data", data, *SMALL, "--save_steps", "1"]
    found = []
    for folder in ("one", "two"):
        assert command(*arguments, "--output_dir", folder)[0] == 0
        found += re.findall(r"hash of the teacher's weights\W+(\w+)", Path(folder, "checkpoint-4/run.json").read_text())
    assert len(found) == 2
    assert found[0] == found[1]


def test_the_newest_complete_checkpoint_is_the_one_to_continue_from(tmp_path: Path) -> None:
    assert starting_point(tmp_path / "new", "auto") is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:  # killed while it was written: the Trainer's state comes last
            for name in ("trainer_state.json", "config.json"):
                (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
            for name in ("model", "optimizer", "scheduler", "rng_state"):
                torch.save({}, tmp_path / f"checkpoint-{step}" / f"{name}.pt")
    assert starting_point(tmp_path, "auto") == tmp_path / "checkpoint-10"
    assert starting_point(tmp_path, str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    command: CommandLine, teacher: str, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, "--save_steps", "1"]
    command(*arguments)
    Path("out/metrics.json").unlink()  # as if it had not come to its end
    weights = Path("out/checkpoint-4/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    optimizer = Path("out/checkpoint-3/optimizer.pt")
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    code, _, err = command(*arguments, "--resume_from_checkpoint", str(Path("out/checkpoint-3")))
    assert (code, err.count("\n")) == (2, 1)
    assert "checkpoint-3' is no complete checkpoint: optimizer.pt has 100 bytes, not " in err
    optimizer.unlink()
    (Path("out/checkpoint-3") / "trainer_state.json").unlink()
    code, _, _ = command(*arguments, "--resume_from_checkpoint", "auto")
    assert code == 0
    assert "checkpoint-4 is damaged: model.safetensors has changed since it was written" in caplog.text
    assert "starting from the beginning" in caplog.text
    assert json.loads(Path("out/metrics.json").read_text())["steps_before_resuming"] == 0


def test_auto_starts_from_the_teachers_layers(command: CommandLine, teacher: str, data: str) -> None:
    command("--teacher", teacher, "--data", data, "--output_dir", "out", *SMALL, "--learning_rate", "0")
    student, original = AutoModel.from_pretrained("out"), AutoModel.from_pretrained(teacher)
    for ours, theirs in ((0, 1), (1, 3)):
        name = "attention.self.query.weight"
        copied = student.encoder.layer[ours].get_parameter(name)
        torch.testing.assert_close(copied, original.encoder.layer[theirs].get_parameter(name), rtol=0, atol=0)
    assert AutoConfig.from_pretrained("out").num_hidden_layers == 2
