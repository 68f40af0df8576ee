"""Folders of runs and of their checkpoints: which are whole, whose they are, and from where a run can be continued.

A checkpoint that `minilm.checkpoints` wrote holds a manifest, the size and SHA-256 of each of its files, and
`run.json`, what the run is. A checkpoint without a manifest is judged by what can be read of it.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import distributed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minilm.report import METRICS

MANIFEST, RUN = "manifest.json", "run.json"
RESULTS = ("README.md", "report.md", "curves.png", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
logger = logging.getLogger(__name__)


class OccupiedError(Exception):
    """The output folder holds something that this run would overwrite."""


def starting_point(output: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.

    With "auto", damaged checkpoints are skipped; one warning, logged by the main process alone, names them, what is
    wrong with them and what is continued from instead.

    Args:
        output: the run's folder, which may not exist yet.
        resume: None, a checkpoint's folder, or "auto": the newest intact one in `output`, a fresh start if there is
            none.

    Raises:
        OccupiedError: a finished run, a model or a file of a result's name in `output`, or an unfinished run and
            `resume` is None.
        ValueError: `resume` names no checkpoint, an incomplete or a damaged one.
    """
    if (output / METRICS).exists():
        raise OccupiedError(
            f"{output} holds a finished run (see {output / 'report.md'}): choose another --output_dir or remove it"
        )
    # The Trainer writes its state last, so a checkpoint without it is half-written.
    checkpoints = [path for path in checkpoints_of(output) if (path / TRAINER_STATE_NAME).is_file()]
    if not checkpoints and (output / "config.json").exists():
        raise OccupiedError(f"{output} holds a model already: choose another --output_dir")
    if not checkpoints and (found := next((name for name in RESULTS if (output / name).exists()), None)):
        raise OccupiedError(f"{output} holds a {found}, which the run would overwrite: choose another --output_dir")
    if resume == "auto":
        intact, faults = newest_intact(output)
        if faults and _is_main_process():
            instead = f"continuing from {intact}" if intact else "starting from the beginning"
            logger.warning("%s; %s", "; ".join(faults), instead)
        return intact
    if resume is not None:
        if fault := find_fault(Path(resume)):
            raise ValueError(f"{resume!r} is no complete checkpoint: {fault}")
        return Path(resume)
    if checkpoints:
        raise OccupiedError(
            f"{output} holds an unfinished run ({checkpoints[-1].name}): add --resume_from_checkpoint auto to continue "
            "it, or choose another --output_dir"
        )
    return None


def check_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raises `ValueError` if `checkpoint` belongs to another run: names the first key that differs, and both values.

    Args:
        checkpoint: its folder; one without `run.json`, of another program, is not judged.
        identity: what makes the run what it is, JSON-able, in the order in which it is compared.
    """
    path = checkpoint / RUN
    if not path.exists():
        return
    check_equal(checkpoint, json.loads(path.read_text(encoding="utf-8")), identity)


def check_equal(folder: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises `ValueError` as `check_same_run` if what was saved in `folder` is not `identity`."""
    wanted = json.loads(json.dumps(identity))  # as it would be read back: tuples are lists
    for key in [*wanted, *saved]:
        there, here = (run.get(key, "not set") for run in (saved, wanted))
        if there != here:
            raise ValueError(f"{folder} belongs to another run: its {key} is {there!r}, this run's is {here!r}")


def checkpoints_of(output: Path) -> list[Path]:
    """The folders of that name, by step, whole or not."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in output.glob(f"{prefix}*") if path.is_dir()]
    return sorted((path for path in found if path.name.removeprefix(prefix).isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_intact(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of `output` without a fault, and what is wrong with each newer one."""
    faults: list[str] = []
    for checkpoint in reversed(checkpoints_of(output)):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint} is damaged: {fault}")
    return None, faults


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is. Reads all of its files if it has a manifest."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    if not (checkpoint / MANIFEST).exists():
        return _find_unreadable(checkpoint)
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return str(error)
    return None


def write_manifest(checkpoint: Path) -> None:
    """Writes the manifest of all files that are there now, and has the disk take everything before it returns."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        sync(path)
        name = path.relative_to(checkpoint).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _digest(path)}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync(checkpoint / MANIFEST)
    for folder in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        sync(folder)


def sync(path: Path) -> None:
    """Returns when the disk has the file's content, or the folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_unreadable(checkpoint: Path) -> str | None:
    """Without a manifest: the Trainer's state must be JSON, and no file of weights shorter than its header says."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return f"{TRAINER_STATE_NAME} is not readable"
    except OSError as error:
        return str(error)
    for weights in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{weights.name} is not readable"
    return None


def _is_main_process() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
