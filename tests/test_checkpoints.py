"""Nothing is lost: not by a kill at any moment, a signal, a full disk, a damaged file, nor on one of two ranks.

As a script, one run in a process of its own, which starts anew or continues from what is there:
python test_checkpoints.py FOLDER (plain | killed NTH_SYNC | signals); torchrun ... test_checkpoints.py FOLDER ranks
"""

import errno
import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from minilm.training import ranks, signals
from minilm.training.checkpoints import CheckpointError, CheckpointingTrainer
from minilm.training.folders import INCOMPLETE, open_aside
from minilm.training.ranks import RankError
from minilm.training.runs import MANIFEST, check_same_run, checkpoints_of, find_fault, newest_intact, starting_point

STEPS = 8
DEFAULTS = {
    "max_steps": STEPS,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layers(x)
        return {"loss": (y[:, 0] - labels).square().mean(), "logits": y}


class Counting(CheckpointingTrainer):
    """Keeps how many micro-batches its rank has seen."""

    run_identity = {"objective": "tiny", "sizes": (4, 16)}  # noqa: RUF012
    seen = 0

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        self.seen += 1
        loss: Tensor = super().training_step(*args, **options)
        return loss

    def rank_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class AtStep(TrainerCallback):
    """Calls `act` at the end of the optimiser's `step`, before the Trainer logs, evaluates and saves."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            self.act()


def make(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Counting:
    draw = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(4, generator=draw), "labels": torch.randn((), generator=draw)} for _ in range(20)]
    args = TrainingArguments(str(folder), **{**DEFAULTS, **options})
    trainer = Counting(model=Net(), args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    return trainer


def kill(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def names(folder: Path) -> list[str]:
    """The checkpoints there, all of which must be whole."""
    found = checkpoints_of(folder)
    assert {path.name: find_fault(path) for path in found} == {path.name: None for path in found}
    return [path.name for path in found]


def evaluating_to(monkeypatch: pytest.MonkeyPatch, *losses: float) -> list[float]:
    """Evaluations give these losses; returns those that are still to come."""
    left = list(losses)

    def evaluate(self: Trainer, **_: object) -> dict[str, float]:
        metrics = {"eval_loss": left.pop(0)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(Counting, "evaluate", evaluate)
    return left


def end_of(trainer: Trainer) -> list[Tensor]:
    """Weights and the optimiser's state."""
    states = trainer.optimizer.state_dict()["state"].values()
    return [*trainer.model.parameters(), *(x for state in states for x in state.values())]


def assert_same_end(one: Trainer, other: Trainer) -> None:
    assert one.state.global_step == other.state.global_step
    for a, b in zip(end_of(one), end_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (one, other)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Counting:
    trainer = make(tmp_path_factory.mktemp("uninterrupted"))
    trainer.train()
    return trainer


@pytest.fixture
def copied(uninterrupted: Counting, tmp_path: Path) -> Path:
    """A folder with four whole checkpoints."""
    return Path(shutil.copytree(str(uninterrupted.args.output_dir), tmp_path / "out"))


def process(*argv: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


# Whole or not there


class Killed(BaseException):
    pass


class _Killer:
    """Raises `Killed` at the nth operation on files while armed; an audit hook, which Python never removes."""

    EVENTS = frozenset(["open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"])

    def __init__(self) -> None:
        self.left: int | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, _: object) -> None:
        if self.left is not None and event in self.EVENTS:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed

    @contextmanager
    def at(self, operation: int) -> Iterator[None]:
        self.left = operation
        try:
            yield
        finally:
            self.left = None


@pytest.fixture(scope="module")
def killer() -> _Killer:
    return _Killer()


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, killer: _Killer) -> None:
    """One checkpoint is kept, so that the last one goes as soon as it may."""
    trainer = make(tmp_path / "out", max_steps=2, save_total_limit=1, eval_strategy="steps", eval_steps=2)
    trainer.train()
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    trainer.state.global_step = 4
    seen = []
    for operation in range(1000):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "before", tmp_path / "out")
        try:
            with killer.at(operation):
                trainer._save_checkpoint(trainer.model, None)
        except Killed:
            found = names(tmp_path / "out")
            seen.append(found)
            left = [path.name for path in (tmp_path / "out").iterdir()]
            assert set(left) <= {"checkpoint-2", "checkpoint-4", INCOMPLETE}
            newest, faults = newest_intact(tmp_path / "out")
            assert (newest, faults) == (tmp_path / "out" / found[-1], [])
            continue
        break
    assert operation > 20  # files of the Trainer, of the manifest, folders
    assert [found for found, after in zip(seen, [*seen[1:], None], strict=True) if found != after] == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4"],
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-4"]


def test_a_killed_process_is_continued_as_if_it_had_not_been(uninterrupted: Counting, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third checkpoint (9 syncs make one whole: 7 files, the manifest, two folders)."""
    run = process(__file__, str(tmp_path), "killed", "26")
    assert run.wait(timeout=120) == -signal.SIGKILL, run.stderr.read() if run.stderr else ""
    run.communicate()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / INCOMPLETE / "checkpoint-6" / "model.safetensors").exists()

    trainer = make(tmp_path)
    found = []
    trainer.add_callback(AtStep(5, lambda: found.append((tmp_path / INCOMPLETE).exists())))
    start = starting_point(tmp_path, "auto")
    assert start == tmp_path / "checkpoint-4"
    trainer.train(str(start))
    assert found == [False]
    assert trainer.seen == 2 * STEPS
    assert_same_end(trainer, uninterrupted)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_the_manifest_names_every_file(copied: Path) -> None:
    folder = copied / "checkpoint-8"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert {*files, MANIFEST} == {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "rank_state_0.json", "run.json"} <= set(files)


def test_files_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    trainer.state.global_step = 5
    trainer._save_checkpoint(trainer.model, None)
    files = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert set(done[:-4]) == files - {MANIFEST}
    assert done[-4:] == [MANIFEST, "checkpoint-5", "rename to checkpoint-5", tmp_path.name]


def test_the_best_checkpoint_has_its_last_name_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluating_to(monkeypatch, 3.0, 1.0, 2.0, 2.5)
    trainer = make(tmp_path, save_total_limit=2, eval_strategy="steps", eval_steps=2, **BEST)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    for name in names(tmp_path):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")


def test_checkpoints_from_before_a_return_go_first(copied: Path) -> None:
    trainer = make(copied, save_total_limit=2, max_steps=5, save_steps=5)
    trainer.train(str(copied / "checkpoint-4"))
    assert names(copied) == ["checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_of_the_same_step_is_replaced(copied: Path) -> None:
    (copied / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    (copied / "checkpoint-6" / "stray").touch()
    make(copied, max_steps=6).train(str(copied / "checkpoint-4"))
    assert "checkpoint-6" in names(copied)
    assert (copied / "checkpoint-6.kept" / "stray").exists()  # no run has written it
    assert not (copied / "checkpoint-6" / "stray").exists()
    make(copied, max_steps=6).train(str(copied / "checkpoint-4"))
    assert not (copied / "checkpoint-6.kept-2").exists()


def test_what_an_earlier_attempt_left_is_in_no_checkpoint(tmp_path: Path) -> None:
    left = tmp_path / INCOMPLETE / "checkpoint-4"

    def leave() -> None:
        open_aside(tmp_path)
        left.mkdir()
        (left / "stray").touch()

    trainer = make(tmp_path, AtStep(3, leave), max_steps=4)
    trainer.train()
    assert not (tmp_path / "checkpoint-4" / "stray").exists()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / INCOMPLETE).exists()


def test_the_hub_gets_a_checkpoint_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, find_fault(Path(folder))))
    )
    trainer.args.push_to_hub = True
    trainer._save_checkpoint(trainer.model, None)
    assert pushed == [(str(tmp_path / "checkpoint-1"), None)]


# A disk that takes no more


def stopped_by_disk(folder: Path, trainer: Trainer, cause: str) -> None:
    """Training ends at step 4 with one sentence, and all that was there before is there."""
    with pytest.raises(CheckpointError) as failure:
        trainer.train()
    message = str(failure.value)
    assert message.startswith(f"cannot save {folder / 'checkpoint-4'} with ")
    assert cause in message
    assert message.endswith(f"; the newest intact checkpoint is {folder / 'checkpoint-2'}")
    assert "\n" not in message
    assert failure.value.__cause__ is not None
    assert names(folder) == ["checkpoint-2"]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writer", ["torch.save", "safetensors.torch.save_file", "os.fsync", "os.mkdir", "os.rename"])
def test_a_full_disk_ends_the_run_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    trainer = make(tmp_path, AtStep(4, lambda: monkeypatch.setattr(writer, full)), save_total_limit=1)
    stopped_by_disk(tmp_path, trainer, "[Errno 28] No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(("bytes_", "cause"), [(300, "File too large"), (2500, "")])
def test_what_the_system_refuses_ends_the_run_with_one_sentence(tmp_path: Path, bytes_: int, cause: str) -> None:
    """Files may not grow beyond a limit: too small for the weights (an error of safetensors), for torch.save's.

    The latter's words differ from version to version and do not name the cause.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make(tmp_path, AtStep(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))))
    try:
        stopped_by_disk(tmp_path, trainer, cause)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_saving_the_model_alone_raises_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path)
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()


def test_the_first_checkpoint_may_be_the_one_that_fails(tmp_path: Path) -> None:
    (tmp_path / INCOMPLETE).touch()  # a file where the folder goes; root may write anywhere
    with pytest.raises(CheckpointError, match=r"that no run of ours has made.*; there is no intact checkpoint$"):
        make(tmp_path).train()


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_nothing_is_lost(
    uninterrupted: Counting, tmp_path: Path, number: signal.Signals
) -> None:
    """At step 3, where nothing is due; it comes between the micro-batches, the step is finished first."""
    trainer = make(tmp_path)
    step = trainer.training_step

    def signalled_step(*args: Any, **options: Any) -> Tensor:
        if trainer.seen == 5:
            os.kill(os.getpid(), number)
        return step(*args, **options)

    trainer.training_step = signalled_step  # type: ignore[method-assign]
    before = signal.getsignal(number)
    assert trainer.train().global_step == 3
    assert trainer.stopped_by is number
    assert signal.getsignal(number) is before
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]

    again = make(tmp_path)
    again.train(str(starting_point(tmp_path, "auto")))
    assert again.stopped_by is None
    assert_same_end(again, uninterrupted)


def test_a_step_that_was_saved_is_not_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = Trainer._save_checkpoint
    monkeypatch.setattr(
        Trainer, "_save_checkpoint", lambda self, *args: [saved.append(self.state.global_step), save(self, *args)]
    )
    trainer = make(tmp_path, AtStep(4, kill()))
    trainer.train()
    assert trainer.stopped_by is signal.SIGTERM
    assert saved == [2, 4]


def test_what_is_due_at_the_step_is_done_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer would not save at step 4, which is not better than step 2."""
    left = evaluating_to(monkeypatch, 1.0, 2.0)
    trainer = make(tmp_path, AtStep(4, kill()), save_strategy="best", eval_strategy="steps", eval_steps=2, **BEST)
    trainer.train()
    assert left == []
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_the_best_model_is_not_loaded_where_the_run_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer's end would load checkpoint-2 and, with one to keep, remove the one saved by the signal."""
    evaluating_to(monkeypatch, 1.0)
    trainer = make(tmp_path, AtStep(3, kill()), save_total_limit=1, eval_strategy="steps", eval_steps=2, **BEST)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(saved[name].equal(value) for name, value in trainer.model.state_dict().items())


def test_a_second_signal_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", -1.0)
    trainer = make(tmp_path, AtStep(3, kill(signal.SIGINT)), AtStep(3, kill(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_same_signal_passed_on_twice_is_one(tmp_path: Path) -> None:
    trainer = make(tmp_path, AtStep(3, kill(signal.SIGINT)), AtStep(3, kill(signal.SIGTERM)))
    trainer.train()
    assert trainer.stopped_by is signal.SIGINT
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_a_signal_after_the_last_step_is_passed_on(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        def on_train_end(self, *_: object, **__: object) -> None:  # type: ignore[override]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Late(), max_steps=2).train()
    assert names(tmp_path) == ["checkpoint-2"]


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = make(tmp_path, AtStep(1, kill(signal.SIGINT)), max_steps=2)
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.stopped_by is None
    assert names(tmp_path) == ["checkpoint-2"]


def test_in_another_thread_it_trains_without_handlers(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(timeout=30)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_process_that_is_asked_to_end_saves_and_ends(uninterrupted: Counting, tmp_path: Path) -> None:
    run = process(__file__, str(tmp_path), "signals")
    assert run.stdout is not None
    assert run.stdout.readline() == "step 3\n"
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, err
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]

    again = make(tmp_path)
    again.train(str(starting_point(tmp_path, "auto")))
    assert_same_end(again, uninterrupted)


# What is continued from


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each kind of file, truncated, changed, gone."""
    newest, previous = copied / "checkpoint-8", copied / "checkpoint-6"
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for damage in (truncated, flipped, Path.unlink):
            if (path.name, damage) == (MANIFEST, Path.unlink):
                continue  # then it is judged as one of another program
            damage(path)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert starting_point(copied, "auto") == previous
            [message] = [record.getMessage() for record in caplog.records]
            assert message.startswith(f"{newest} is damaged: ")
            assert path.name in message
            assert message.endswith(f"; continuing from {previous}")
            with pytest.raises(ValueError, match=rf"checkpoint-8' is no complete checkpoint: .*{path.name}"):
                starting_point(copied, str(newest))
            path.write_bytes(content)
    assert starting_point(copied, "auto") == newest
    assert starting_point(copied, str(newest)) == newest


def test_where_all_are_damaged_it_says_so(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in checkpoints_of(copied):
        truncated(folder / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        assert starting_point(copied, "auto") is None
    [message] = [record.getMessage() for record in caplog.records]
    assert message.count("is damaged: optimizer.pt has") == 4
    assert message.endswith("; starting from the beginning")


def test_without_a_manifest_it_must_be_readable(copied: Path) -> None:
    newest = copied / "checkpoint-8"
    (newest / MANIFEST).unlink()
    assert starting_point(copied, "auto") == newest
    weights = newest / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert find_fault(newest) == "model.safetensors is not readable"
    assert starting_point(copied, "auto") == copied / "checkpoint-6"
    weights.write_bytes(content)
    (newest / "trainer_state.json").write_bytes(b"")  # as a file system leaves it when the power goes
    assert find_fault(newest) == "trainer_state.json is not readable"
    assert starting_point(copied, "auto") == copied / "checkpoint-6"


def test_a_checkpoint_of_another_run_is_refused(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied / "checkpoint-8"
    check_same_run(folder, {"objective": "tiny", "sizes": (4, 16)})
    with pytest.raises(
        ValueError, match=r"checkpoint-8 belongs to another run: its sizes is \[4, 16\], this run's is 5"
    ):
        check_same_run(folder, {"objective": "tiny", "sizes": 5})
    assert not caplog.records
    check_same_run(folder, {"objective": "tiny", "seed": 3})  # a version that did not write the seed
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} does not say its seed: whether they are this run's cannot be told"
    ]
    (folder / "run.json").unlink()
    check_same_run(folder, {"objective": "other"})


# Ranks


def test_the_state_of_other_ranks_is_refused(copied: Path) -> None:
    state = copied / "checkpoint-4" / "rank_state_0.json"
    state.write_text(json.dumps({"processes": 2, "state": {"seen": 1}}))
    with pytest.raises(ValueError, match="was saved by 2 processes and cannot be continued by 1"):
        make(copied).train(str(copied / "checkpoint-4"))


def test_two_ranks_stop_together_continue_fail_together_and_name_one_that_hangs(tmp_path: Path) -> None:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]
    run = process(*launcher, __file__, str(tmp_path), "ranks")
    _, err = run.communicate(timeout=100)
    assert run.returncode == 1, err[-3000:]
    assert (tmp_path / "told.txt").read_text() == (
        "of the 2 ranks rank 1 has ended, or does not answer any more: the run has ended at step 3, and the newest "
        f"intact checkpoint is {tmp_path / 'hung' / 'checkpoint-2'}"
    )
    assert names(tmp_path / "hung") == ["checkpoint-2"]

    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["stopped"] for rank in said] == [["SIGTERM", 5]] * 2  # only the second got the signal
    assert [rank["continued"] for rank in said] == [[True, True]] * 2
    for rank in said:
        assert rank["failure"].startswith(f"cannot save {tmp_path / 'failed' / 'checkpoint-2'} with ")
        assert "No space left on device" in rank["failure"]  # only the second could not write
        assert rank["failure"].endswith("; there is no intact checkpoint")
    assert list((tmp_path / "failed").iterdir()) == []

    assert names(tmp_path / "stopped") == [f"checkpoint-{step}" for step in (2, 4, 5, 6, 8)]
    files = json.loads((tmp_path / "stopped" / "checkpoint-5" / MANIFEST).read_text())["files"]
    assert {
        f"{kind}_{rank}.{end}" for kind, end in (("rng_state", "pth"), ("rank_state", "json")) for rank in (0, 1)
    } <= set(files)


def two_ranks(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    load = torch.load  # transformers 5.0 wants tensors on "cpu:1", of which torch knows nothing
    torch.load = lambda *args, map_location=None, **options: load(*args, map_location="cpu", **options)
    whole = make(folder / "whole")
    whole.train()
    stopped = make(folder / "stopped", *([AtStep(5, kill())] if rank else []))
    stopped.train()
    assert stopped.stopped_by is not None
    continued = make(folder / "stopped")
    continued.train(str(starting_point(folder / "stopped", "auto")))
    same = all(a.equal(b) for a, b in zip(end_of(whole), end_of(continued), strict=True))
    failing, save = make(folder / "failed"), torch.save
    if rank:
        torch.save = full
    try:
        failing.train()
        failure = ""
    except CheckpointError as error:
        failure = str(error)
    said = {
        "stopped": [stopped.stopped_by.name, stopped.state.global_step],
        "continued": [same, continued.seen == whole.seen],
        "failure": failure,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    torch.save, ranks.SILENT_SECONDS = save, 2.0
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    try:
        make(folder / "hung", *([AtStep(3, kill(signal.SIGSTOP))] if rank else []), ddp_timeout=5).train()
    except RankError as error:
        (folder / "told.txt").write_text(str(error))
        os.kill(int((folder / "pid1").read_text()), signal.SIGKILL)  # the launcher would wait half a minute
        os._exit(1)


def main(folder: Path, mode: str, *options: str) -> int:
    if mode == "ranks":
        two_ranks(folder)
        gc.collect()  # DDP's wrappers, or gloo aborts a process that still holds its group when the interpreter ends
        return 0
    trainer = make(folder)
    if mode == "killed":
        left, sync = int(options[0]), os.fsync

        def killing_sync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        os.fsync = killing_sync
    elif mode == "signals":

        def wait() -> None:
            print("step 3", flush=True)
            while not trainer._signals.noted:
                time.sleep(0.01)

        trainer.add_callback(AtStep(3, wait))
    trainer.train()
    return 128 + trainer.stopped_by if trainer.stopped_by else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
