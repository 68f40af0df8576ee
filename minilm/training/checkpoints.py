"""A Trainer that loses nothing: its checkpoints are whole or not there, and SIGTERM and Ctrl-C save one first.

A checkpoint is written by the Trainer's own code, whatever it saves (DDP, FSDP, DeepSpeed), into `_incomplete/` of the
output folder. When every rank is done, the main process

    syncs the files to disk, writes their manifest, and renames  _incomplete/checkpoint-N -> checkpoint-N

A rename happens or does not, so a kill at any moment leaves the checkpoints that were there, with or without the new
one, and a folder `_incomplete` that the next start or save removes. Only then are old checkpoints removed, through a
rename into `_incomplete` too. `minilm.training.folders` says which are ours to remove.

A signal (`minilm.training.signals`) is acted upon at the end of the optimiser step: between two micro-batches there are
gradients that no checkpoint holds. The ranks take the maximum of what each has noted, so all of them stop after the
same step.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from minilm.data.faults import DataError
from minilm.errors import NonFiniteError, UsageError
from minilm.training.folders import INCOMPLETE, STUDENT, close_aside, is_own, make_way, open_aside, publish
from minilm.training.manifests import RUN, sync, write_manifest
from minilm.training.ranks import Pulse, RankError
from minilm.training.runs import checkpoints_of, step_of, what_is_intact
from minilm.training.signals import Signals

# safetensors has an error of its own for what the system refuses; torch.save's is a RuntimeError.
FAILURES = (OSError, SafetensorError, RuntimeError)


class CheckpointError(Exception):
    """A checkpoint, the student or its report could not be saved: one sentence with the folder, the cause and what
    there is instead.
    """


class CheckpointingTrainer(Trainer):
    """`transformers.Trainer` with whole checkpoints, saved also when SIGTERM or Ctrl-C ends the run.

    A subclass says what run its checkpoints belong to (`run_identity`, kept in `run.json`) and may keep more per rank
    (`rank_state`, `restore_rank_state`).

    Attributes:
        stopped_by: the signal that ended the last `train()` before its end, after a checkpoint of the last step done;
            None if it ran to its end.

    Raises (from `train`):
        CheckpointError: on every rank, if one of them could not write; of a checkpoint that would run code when read.
        DataError: from `stop_after_saving`.
        RankError: another rank has ended, or did not answer within `ddp_timeout`.
        KeyboardInterrupt: at a second Ctrl-C, at once; a second SIGTERM ends the process as it did before `train()`.
            A launcher and a terminal may both pass on one and the same: within a second it does not count twice.
        ValueError: a checkpoint with the state of another number of ranks.
    """

    run_identity: dict[str, Any] | None = None  # JSON-able; see `minilm.training.runs.check_same_run`
    stopped_by: signal.Signals | None = None

    _signals: Signals
    _saving = False
    _saved_step: int | None = None
    _failed: Exception | None = None
    _limit: int | None = None  # of checkpoints, while training

    def rank_state(self) -> dict[str, Any]:
        """What this rank must know to continue beside the Trainer's own state: JSON-able; empty is not saved."""
        return {}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """Takes back what `rank_state` gave, before the data loaders are made."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As the Trainer's. Stopped by a signal, it gives the steps done and a loss of NaN, and see `stopped_by`."""
        output = str(self.args.output_dir)
        if resume_from_checkpoint is True and os.path.isdir(output):
            resume_from_checkpoint = get_last_checkpoint(output) or True  # type: ignore[no-untyped-call]
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool):
            self.load_rank_state(Path(resume_from_checkpoint))
        if self.args.should_save:
            close_aside(Path(output))
        self.stopped_by = self._saved_step = None
        pulse = Pulse(self.args.ddp_timeout_delta)
        with Signals() as self._signals, pulse, self._without_the_trainers_removal():
            try:
                result: TrainOutput = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except UnpicklingError as error:  # of torch's loader of weights alone, by which the Trainer reads all files
                raise CheckpointError(
                    f"cannot continue from {resume_from_checkpoint}: one of its files would run code when it is read, "
                    "which is never done"
                ) from error
            except (DataError, NonFiniteError):
                self._end_early()
                raise
            except _Stop as stop:
                # Not by control.should_training_stop: the Trainer's end loads the best model and, where one
                # checkpoint is kept, removes the others, and at the end of an epoch it evaluates and saves once more.
                self.stopped_by = stop.by
                self._end_early()
                result = TrainOutput(self.state.global_step, float("nan"), {})
            except RuntimeError as error:
                if what := pulse.what_ended(error):
                    at = f"the run has ended at step {self.state.global_step}"
                    raise RankError(f"{what}: {at}, and {what_is_intact(Path(output))}") from error
                raise
        if self.stopped_by is None and self.args.should_save:
            self._keep_the_best_alone(Path(output))
        if self.stopped_by is None and self._signals.noted:
            signal.raise_signal(self._signals.noted)  # it came after the last step: whoever comes next shall know
        return result

    def _end_early(self) -> None:
        """What the Trainer does at its own end, closing of the bars among it."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **options: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **options)
        noted = self._signals.noted
        if self.args.world_size > 1:
            noted = int(self.accelerator.gather(torch.tensor([noted], device=self.args.device)).max())
        if noted:
            if self._saved_step != self.state.global_step or self.args.save_only_model:
                with self._saving_in_full():  # to be continued from
                    self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise _Stop(signal.Signals(noted))

    def stop_after_saving(self, fault: DataError) -> NoReturn:
        """Ends the run between two steps, on all ranks at once, by `fault` and after a checkpoint of the last step."""
        step = self.state.global_step
        if not step:
            raise fault
        if self._saved_step != step:
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        raise DataError(
            f"{fault}; a checkpoint of step {step} was saved, from which --resume_from_checkpoint auto continues on "
            "the same data"
        ) from fault

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        whole, part = run / name, run / INCOMPLETE / name
        with self._on_all_ranks(run, str(whole)):
            if self.args.should_save:
                open_aside(run)
                part.mkdir()
        with self._on_all_ranks(run, str(whole)):
            self._write(model, trial, whole, part)
        with self._on_all_ranks(run, str(whole)):
            if self.args.should_save:
                if self.run_identity is not None:
                    (part / RUN).write_text(json.dumps(self.run_identity, indent=1), encoding="utf-8")
                write_manifest(part, resumable=not self.args.save_only_model)
                if is_own(whole, self.run_identity):  # left by a run that was continued from an earlier checkpoint
                    whole.rename(run / INCOMPLETE / "replaced")
                elif os.path.lexists(whole):
                    make_way(whole)
                part.rename(whole)
                sync(run)
                self._rotate(run, whole)
                with suppress(OSError):  # the next start or save removes it
                    close_aside(run)
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(whole))

    def save_student(self, add: Callable[[Path], None] = lambda folder: None) -> None:
        """Saves the model into the output folder as `save_model` does, whole or not there, and on disk.

        Args:
            add: puts more files beside it, called by the main process with the folder in which it is put together.

        Raises:
            CheckpointError: on every rank, if one of them could not write, or a file of the user's is in the way of
                one of the model's: then the model stays whole in the folder that the sentence names.
        """
        run = Path(str(self.args.output_dir))
        part, what = run / INCOMPLETE / STUDENT, f"the student in {run}"
        with self._on_all_ranks(run, what):
            if self.args.should_save:
                open_aside(run)
                part.mkdir()
        with self._on_all_ranks(run, what):
            self.save_model(str(part))
        with self._on_all_ranks(run, what):
            if self.args.should_save:
                add(part)
                write_manifest(part)
        in_the_way: list[str] = []
        with self._on_all_ranks(run, what, left=part):
            if self.args.should_save:
                in_the_way = publish(part, run, all_or_none=True)
        if blocked := gather_object(in_the_way):
            raise CheckpointError(
                f"{run / blocked[0]} was not written by this run and was left alone: the student is whole in {part}"
            )
        if self.args.should_save:
            with suppress(OSError):
                close_aside(run)

    def _write(self, model: nn.Module, trial: Any, whole: Path, part: Path) -> None:
        """The Trainer's own saving, with `_incomplete` as its run's folder, but for the name of the best checkpoint."""
        self._saving, self._failed = True, None
        try:
            super()._save_checkpoint(model, trial)
        except FAILURES as error:
            self._failed = self._failed or error  # the first one tells more: what follows fails because of it
        finally:
            self._saving = False
        if self._failed is not None:
            raise self._failed
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(whole)
        if self.args.should_save:
            self.state.save_to_json(str(part / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        run = str(super()._get_output_dir(trial))
        return os.path.join(run, INCOMPLETE) if self._saving else run

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's."""
        try:
            super().save_model(output_dir, _internal_call)
        except FAILURES as error:
            if not self._saving:
                raise
            self._failed = error  # kept until the ranks, which may wait for each other in what follows, are done

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if state := self.rank_state():
            content = {"processes": self.args.world_size, "state": state}
            path = Path(output_dir, f"rank_state_{self.args.process_index}.json")
            path.write_text(json.dumps(content), encoding="utf-8")

    def load_rank_state(self, checkpoint: Path) -> None:
        """Gives this rank's part of a checkpoint to `restore_rank_state`, as `train` does. Raises `ValueError` if it
        was saved by another number of ranks.
        """
        saved = {path.name: json.loads(path.read_text("utf-8")) for path in checkpoint.glob("rank_state_*.json")}
        for content in saved.values():
            if content["processes"] != self.args.world_size:
                raise UsageError(
                    f"{checkpoint} was saved by {content['processes']} processes and cannot be continued by "
                    f"{self.args.world_size}: each has a part of the data"
                )
        if saved:
            self.restore_rank_state(saved[f"rank_state_{self.args.process_index}.json"]["state"])

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer would push while it saves; `_save_checkpoint` does when the folder has its name.
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _rotate(self, run: Path, newest: Path) -> None:
        """Keeps `save_total_limit` checkpoints, the newest and the best among them.

        Not the Trainer's, which goes by times or step numbers: after a return to an earlier checkpoint, because the
        later ones were damaged, it may take one of those for the newest and remove the one just written.
        """
        if self._limit is None or self._limit <= 0:
            return
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        checkpoints = [path for path in checkpoints_of(run) if is_own(path, self.run_identity)]
        others = [path for path in checkpoints if path.name not in kept]
        # Those of a later step, from before the return, go first.
        others.sort(key=lambda path: step_of(path) < self.state.global_step)
        for path in others[: max(0, len(checkpoints) - self._limit)]:
            path.rename(run / INCOMPLETE / path.name)

    @contextmanager
    def _without_the_trainers_removal(self) -> Iterator[None]:
        """The Trainer removes what is named as a checkpoint, whosever it is: it must see no limit."""
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = self._limit

    def _keep_the_best_alone(self, run: Path) -> None:
        """At the end of training, where one checkpoint is to be kept and one was the best; as the Trainer does."""
        best = self.state.best_model_checkpoint
        if best is not None and self._limit == 1 and Path(best).is_dir():
            with suppress(OSError):  # the student matters more
                open_aside(run)
                self._rotate(run, Path(best))
                close_aside(run)

    @contextmanager
    def _saving_in_full(self) -> Iterator[None]:
        before, self.args.save_only_model = self.args.save_only_model, False
        try:
            yield
        finally:
            self.args.save_only_model = before

    @contextmanager
    def _on_all_ranks(self, run: Path, what: str, left: Path | None = None) -> Iterator[None]:
        """A part of saving that succeeds everywhere or ends the run everywhere; the ranks wait for each other.

        Args:
            left: what is whole aside and stays there; without it, what is aside is removed.
        """
        failure: Exception | None = None
        try:
            yield
        except FAILURES as error:
            failure = error
        cause = [" ".join(str(failure).split()) or repr(failure)] if failure else []
        causes = gather_object(cause)
        if causes:
            if self.args.should_save and left is None:
                with suppress(OSError):
                    close_aside(run)
            free = f" with {shutil.disk_usage(run).free / 1e9:.1f} GB free" if run.is_dir() else ""
            rest = f"it is whole in {left}" if left else what_is_intact(run)
            raise CheckpointError(f"cannot save {what}{free} ({causes[0]}); {rest}") from failure


class _Stop(Exception):
    """Leaves the Trainer's loop after a checkpoint."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by)
        self.by = by
