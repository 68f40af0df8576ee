"""Nothing of the user's is removed or overwritten: by a fresh run, rotation, a resumed run, nor at the end."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CommandLine
from transformers import AutoModel

from minilm.cli import distill
from minilm.training.folders import INCOMPLETE, STUDENT, OccupiedError, claimed, close_aside, open_aside
from minilm.training.runs import find_fault
from minilm.training.trainer import DistillationTrainer

SMALL = [
    *("--student_num_layers", "2", "--max_length", "24", "--max_steps", "4", "--per_device_train_batch_size", "4"),
    *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "--output_dir", "out"),
]
RESUME = ("--resume_from_checkpoint", "auto")


@pytest.fixture
def flags(teacher: str, data: str) -> list[str]:
    return ["--teacher", teacher, "--data", data, *SMALL]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unfinished(command: CommandLine, flags: list[str], *more: str) -> None:
    """A run with checkpoints at 2 and 4 that did not come to its end."""
    assert command(*flags, "--save_steps", "2", *more)[0] == 0
    for path in Path("out").iterdir():
        if path.is_file():
            path.unlink()


def fails_at(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(name, fail)


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint-9/thesis.txt", "checkpoint-1/trainer.log", "checkpoint-5", f"{INCOMPLETE}/notes.txt", INCOMPLETE),
        *("generation_config.json", "chat_template.jinja", "vocab.txt", "modules.json", "metrics.json"),
    ],
)
@pytest.mark.parametrize("resume", [(), RESUME])
def test_a_folder_with_something_of_the_users_is_refused(
    command: CommandLine, flags: list[str], name: str, resume: tuple[str, ...]
) -> None:
    Path("out", name).parent.mkdir(parents=True)
    Path("out", name).write_text("my own")
    before = contents(Path("out"))
    code, out, err = command(*flags, "--save_steps", "1", "--save_total_limit", "1", *resume)
    assert (code, out, err.count("\n"), contents(Path("out"))) == (1, "", 1, before)
    assert "choose another --output_dir" in err


def test_a_link_to_a_checkpoint_is_refused_and_what_it_points_to_left_alone(
    command: CommandLine, flags: list[str]
) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/manifest.json").write_text('{"files": {}}')
    Path("out").mkdir()
    Path("out/checkpoint-2").symlink_to("../elsewhere")
    assert command(*flags, "--save_steps", "1", "--save_total_limit", "1")[0] == 1
    assert Path("out/checkpoint-2/manifest.json").exists()


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "generation_config.json", "1_Pooling/config.json"])
def test_what_came_since_is_not_overwritten_on_resuming(command: CommandLine, flags: list[str], name: str) -> None:
    unfinished(command, flags)
    Path("out", name).parent.mkdir(exist_ok=True)
    Path("out", name).write_text("my own")
    code, _, err = command(*flags, *RESUME)
    assert (code, Path("out", name).read_text()) == (1, "my own")
    assert f"out holds a {name}, which the run would overwrite" in err


def test_what_an_earlier_part_of_the_run_wrote_is_replaced_unless_it_was_changed(
    command: CommandLine, flags: list[str]
) -> None:
    assert command(*flags, "--save_steps", "2")[0] == 0
    Path("out/metrics.json").unlink()
    Path("out/README.md").write_text("my own")
    code, _, err = command(*flags, *RESUME)
    assert (code, Path("out/README.md").read_text()) == (1, "my own")
    assert "out holds a README.md" in err
    Path("out/README.md").unlink()
    assert command(*flags, *RESUME)[0] == 0


def test_checkpoints_that_are_not_this_runs_are_never_rotated(
    command: CommandLine, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Another tool's, another run's, one with a file of the user's; and one that is in the way."""
    unfinished(command, flags, "--save_total_limit", "9")
    four = Path("out/checkpoint-4")
    os.rename(four, "out/checkpoint-1")
    identity = json.loads(Path("out/checkpoint-1/run.json").read_text())
    Path("out/checkpoint-1/run.json").write_text(json.dumps({**identity, "seed": 7}))
    four.mkdir()
    (four / "trainer_state.json").write_text("{}")
    (four / "mine").write_text("my own")
    Path("out/checkpoint-2/mine").write_text("my own")
    before = contents(Path("out"))
    assert command(*flags, "--save_steps", "1", "--save_total_limit", "1", *RESUME)[0] == 0
    after = contents(Path("out"))
    moved = {name.replace("out/checkpoint-4/", "out/checkpoint-4.kept/"): content for name, content in before.items()}
    assert moved.items() <= after.items()
    assert find_fault(four) is None
    assert not Path("out/checkpoint-3").exists()  # which is this run's
    assert "out/checkpoint-4 was not written by this run" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_came_while_training_is_left_alone_and_the_student_stays_aside(
    command: CommandLine, flags: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train = DistillationTrainer.train

    def put(self: DistillationTrainer, *args: object, **options: object) -> object:
        Path("out", name).write_text("my own")
        return train(self, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", put)
        code, _, err = command(*flags, "--save_strategy", "no")
    assert (code, err.count("\n"), Path("out", name).read_text()) == (1, 1, "my own")
    whole = Path("out", INCOMPLETE, STUDENT)
    assert f"out/{name} was not written by this run and was left alone: the student is whole in {whole}" in err
    assert AutoModel.from_pretrained(whole).config.num_hidden_layers == 2
    Path("out", name).unlink()
    for resume in ((), RESUME):
        code, _, err = command(*flags, *resume)
        assert code == 1
        assert f"out holds a student that is whole, in {whole}: move it" in err


def test_a_card_that_came_while_measuring_is_left_alone(
    command: CommandLine, flags: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measure = distill.measure_speed

    def put(*args: object) -> object:
        Path("out/README.md").write_text("my own")
        return measure(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(distill, "measure_speed", put)
    assert command(*flags)[0] == 0
    assert Path("out/README.md").read_text() == "my own"
    assert Path("out", INCOMPLETE, "report", "README.md").read_text().startswith("---")
    assert "README.md in out was not written by this run and was left alone" in caplog.text
    assert Path("out/metrics.json").exists()


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writer", ["transformers.PreTrainedModel.save_pretrained", "os.fsync", "os.mkdir"])
def test_a_full_disk_at_the_end_leaves_no_half_student(
    command: CommandLine, flags: list[str], monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    save = DistillationTrainer.save_student

    def on_a_full_disk(self: DistillationTrainer, *args: object) -> None:
        with monkeypatch.context() as patch:
            fails_at(patch, writer, FULL)
            save(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "save_student", on_a_full_disk)
        code, _, err = command(*flags, "--save_strategy", "no")
    assert (code, err.count("\n")) == (1, 1)
    assert "cannot save the student in out with" in err
    assert "No space left on device" in err
    assert not contents(Path("out"))
    assert command(*flags, "--save_strategy", "no")[0] == 0


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("minilm.cli.report.plot_curves", RuntimeError("no fonts")),
        ("minilm.cli.distill.measure_speed", IndexError("list index out of range")),
        ("minilm.cli.report.model_card", FULL),
    ],
)
def test_what_goes_wrong_after_training_does_not_cost_the_student(
    command: CommandLine, flags: list[str], monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    with monkeypatch.context() as patch:
        fails_at(patch, place, error)
        code, _, err = command(*flags, "--save_steps", "4")
    assert (code, err.count("\n")) == (1, 1)
    assert "the student is saved in out, but not its report: " in err
    assert AutoModel.from_pretrained("out").config.num_hidden_layers == 2
    assert not Path("out/metrics.json").exists()
    assert command(*flags, *RESUME)[0] == 0
    assert {"README.md", "report.md", "curves.png", "metrics.json"} <= {path.name for path in Path("out").iterdir()}
    assert not Path("out", INCOMPLETE).exists()


def test_a_kill_while_the_student_comes_to_its_place_costs_nothing(
    command: CommandLine, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its files; the next start makes it again from the checkpoint, or says where it is whole."""

    class Killed(BaseException):
        pass

    assert command(*flags, "--save_steps", "4")[0] == 0
    student = Path("out/model.safetensors").read_bytes()
    link = os.link
    for file in range(4):
        Path("out/metrics.json").unlink()
        left = file

        def killing(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            link(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", killing)
            with pytest.raises(Killed):
                command(*flags, *RESUME)
        assert (Path("out", INCOMPLETE, STUDENT, "model.safetensors")).read_bytes() == student
        assert command(*flags, *RESUME)[0] == 0
        assert Path("out/model.safetensors").read_bytes() == student


def test_a_claimed_folder_is_refused_and_a_kill_gives_it_back(command: CommandLine, flags: list[str]) -> None:
    script = "import os, sys; from pathlib import Path; from minilm.training.folders import claimed\n"
    script += "with claimed(Path('out')):\n    if os.fork() == 0: print('', flush=True)\n    sys.stdin.read(1)\n"
    # Its forked child, as a data loader's worker, lives on after the kill.
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    code, _, err = command(*flags)
    assert (code, err) == (1, "minilm-train: error: another run is writing into out: wait for it or choose another "
                              "--output_dir\n")  # fmt: skip
    holder.kill()
    holder.wait()
    assert command(*flags)[0] == 0
    assert holder.stdin is not None
    holder.stdin.close()
    holder.stdout.close()


def test_a_folder_that_cannot_be_written_is_noticed_at_the_start(
    command: CommandLine, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails_at(patch, "tempfile.TemporaryFile", PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        code, _, err = command(*flags)
    assert (code, err) == (1, "minilm-train: error: cannot write into the output folder out: Permission denied\n")
    assert not Path("out").exists()
    Path("out").write_text("a file")
    code, _, err = command(*flags)
    assert (code, err) == (1, "minilm-train: error: cannot write into the output folder out: File exists\n")
    assert Path("out").read_text() == "a file"


def test_a_claim_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with claimed(tmp_path / "c"):
        (tmp_path / "c" / "mine").touch()
    assert (tmp_path / "c" / "mine").exists()


def test_where_folders_cannot_be_claimed_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails_at(monkeypatch, "fcntl.flock", OSError(errno.EBADF, os.strerror(errno.EBADF)))
    with claimed(tmp_path):
        assert "cannot be claimed (Bad file descriptor): see that no other run writes there" in caplog.text


def test_what_is_aside_is_ours_by_its_mark_whenever_a_kill_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = open_aside(tmp_path)
    (aside / "a").mkdir()
    (aside / "b").touch()
    fails_at(monkeypatch, "shutil.rmtree", FULL)
    with pytest.raises(OSError, match="No space"):
        close_aside(tmp_path)
    monkeypatch.undo()
    close_aside(tmp_path)
    assert not aside.exists()
    aside.mkdir()  # killed before the mark was made
    assert open_aside(tmp_path) == aside


def test_a_damaged_checkpoint_without_a_manifest_is_passed_over_or_told(
    command: CommandLine, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As other tools and older versions leave them."""
    unfinished(command, flags)
    newest = Path("out/checkpoint-4")
    (newest / "manifest.json").unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "model.safetensors"):
        damaged, content = newest / name, (newest / name).read_bytes()
        for damage in (content[: len(content) // 2], b"", None):
            damaged.unlink()
            if damage is not None:
                damaged.write_bytes(damage)
            said = f"it has no {name}" if damage is None else f"{name} is not readable"
            assert find_fault(newest, ["config.json"]) == said
            code, _, err = command(*flags, "--resume_from_checkpoint", str(newest))
            assert (code, err.count("\n")) == (2, 1)
            assert f"is no complete checkpoint: {said}" in err
            damaged.write_bytes(content)
    assert find_fault(newest, ["config.json"]) is None
    damaged.unlink()
    assert command(*flags, *RESUME)[0] == 0
    assert f"checkpoint-4 is damaged: it has no {name}; continuing from out/checkpoint-2" in caplog.text


def test_checkpoints_of_weights_alone_are_not_continued_from(command: CommandLine, flags: list[str]) -> None:
    unfinished(command, flags, "--save_only_model")
    code, _, err = command(*flags, *RESUME)
    assert (code, err.count("\n")) == (1, 1)
    assert "checkpoint-4 cannot be continued from: it holds the weights alone (--save_only_model)" in err
    code, _, err = command(*flags, "--resume_from_checkpoint", "out/checkpoint-2")
    assert code == 2
    assert "is no complete checkpoint: it holds the weights alone" in err
    code, _, err = command(*flags)
    assert code == 1
    assert "out holds checkpoint-4, which cannot be continued from (it holds the weights alone" in err


def test_a_forgotten_flag_is_another_run(command: CommandLine, flags: list[str]) -> None:
    unfinished(command, flags)
    for flag, value, key in [
        ("learning_rate", "1e-3", "learning_rate"),
        ("per_device_train_batch_size", "2", "sequences_per_step"),
        ("weight_decay", "0.5", "weight_decay"),
        ("lr_scheduler_type", "cosine", "lr_scheduler_type"),
        ("warmup_steps", "3", "warmup_steps"),
        ("student_init", "random", "student_init"),
        ("max_grad_norm", "3", "max_grad_norm"),
    ]:
        code, _, err = command(*flags, *RESUME, f"--{flag}", value)
        assert (code, err.count("\n")) == (2, 1)
        assert f"belongs to another run: its {key} is " in err


def test_other_data_or_another_teacher_under_the_same_name_is_another_run(
    command: CommandLine, flags: list[str], teacher: str, data: str
) -> None:
    unfinished(command, flags)
    text = Path(data).read_text()
    Path(data).write_text(text + "one more line\n")
    code, _, err = command(*flags, *RESUME)
    assert code == 2
    assert "belongs to another run: its fingerprint of the data is " in err
    Path(data).write_text(text)
    original = AutoModel.from_pretrained(teacher)
    changed = AutoModel.from_pretrained(teacher)
    with torch.no_grad():
        changed.encoder.layer[0].attention.self.query.bias[3] += 0.1
    changed.save_pretrained(teacher)
    code, _, err = command(*flags, *RESUME)
    assert code == 2
    assert "belongs to another run: its hash of the teacher's weights is " in err
    original.save_pretrained(teacher)
    os.rename(teacher, "moved")
    os.rename(data, "moved.txt")
    assert command(*flags, *RESUME, "--teacher", "moved", "--data", "moved.txt")[0] == 0


def test_more_steps_than_before_are_told(
    command: CommandLine, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    unfinished(command, flags)
    assert command(*flags, *RESUME, "--max_steps", "6")[0] == 0
    assert "checkpoint-4 was on its way to 4 steps, this run goes to 6: the linear schedule" in caplog.text


def test_a_best_checkpoint_that_is_gone_is_told_before_work(command: CommandLine, flags: list[str]) -> None:
    best = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    unfinished(command, [*flags, *best])
    state = Path("out/checkpoint-4/trainer_state.json")
    state.write_text(
        state.read_text().replace('best_model_checkpoint": "out/checkpoint-4', 'best_model_checkpoint": "x')
    )
    Path("out/checkpoint-4/manifest.json").unlink()
    code, _, err = command(*flags, *best, *RESUME)
    assert (code, err.count("\n")) == (2, 1)
    assert "checkpoint-4 has x for the best so far, which is not there" in err


def test_a_claim_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at(monkeypatch, "fcntl.flock", BlockingIOError(errno.EWOULDBLOCK, "busy"))
    with pytest.raises(OccupiedError, match="another run is writing into"), claimed(tmp_path):
        pass
