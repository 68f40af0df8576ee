"""Folders of runs: which hold a finished one, which can be continued, and from where."""

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minilm.report import METRICS


class OccupiedError(Exception):
    """The output folder holds something that this run would overwrite."""


def starting_point(output: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.

    Args:
        output: the run's folder, which may not exist yet.
        resume: None, a checkpoint's folder, or "auto": the newest complete one in `output`, a fresh start if there is
            none.

    Raises:
        OccupiedError: a finished run or a model in `output`, or an unfinished one and `resume` is None.
        ValueError: `resume` names no complete checkpoint.
    """
    if (output / METRICS).exists():
        raise OccupiedError(
            f"{output} holds a finished run (see {output / 'report.md'}): choose another --output_dir or remove it"
        )
    checkpoints = _complete_checkpoints(output)
    if not checkpoints and (output / "config.json").exists():
        raise OccupiedError(f"{output} holds a model already: choose another --output_dir")
    if resume == "auto":
        return checkpoints[-1] if checkpoints else None
    if resume is not None:
        if not (Path(resume) / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"{resume!r} is no complete checkpoint: it has no {TRAINER_STATE_NAME}")
        return Path(resume)
    if checkpoints:
        raise OccupiedError(
            f"{output} holds an unfinished run ({checkpoints[-1].name}): add --resume_from_checkpoint auto to continue "
            "it, or choose another --output_dir"
        )
    return None


def _complete_checkpoints(output: Path) -> list[Path]:
    """Oldest first. The Trainer writes its state last, so a checkpoint without it is half-written."""
    found = [state.parent for state in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return sorted(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))
