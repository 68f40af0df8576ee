"""Folders of runs and of their checkpoints: which are whole, whose they are, and from where a run can be continued.

A checkpoint that `minilm.training.checkpoints` wrote holds a manifest, the size and SHA-256 of each of its files, and
`run.json`, what the run is. A checkpoint without a manifest is judged by what can be read of it.
"""

import json
import logging
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import distributed
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minilm.errors import UsageError
from minilm.training.folders import INCOMPLETE, aside_is_ours, foreign, whole_student
from minilm.training.folders import OccupiedError as OccupiedError
from minilm.training.manifests import MANIFEST as MANIFEST
from minilm.training.manifests import RUN, differing, digest, read_manifest

METRICS = "metrics.json"  # written last: where it stands, the run is finished
# What a run may end with, as far as it is known before; what else comes is looked at when it does.
RESULTS = (
    *("README.md", "report.md", "curves.png", "config.json", "generation_config.json", "model.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "preprocessor_config.json", "processor_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
)
WEIGHTS_ALONE = "it holds the weights alone (--save_only_model), and no optimiser, schedule and random state"
logger = logging.getLogger(__name__)


def starting_point(output: Path, resume: str | None, needed: Iterable[str] = ()) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.

    With "auto", damaged checkpoints are skipped; one warning, logged by the main process alone, names them, what is
    wrong with them and what is continued from instead.

    Args:
        output: the run's folder, which may not exist yet.
        resume: None, a checkpoint's folder, or "auto": the newest intact one in `output`, a fresh start if there is
            none.
        needed: files without which a checkpoint is not complete, beside those that every one has.

    Raises:
        OccupiedError: a finished run, a model or something under a name that the run writes to in `output`; an
            unfinished run and `resume` is None; with "auto", checkpoints of weights alone and no other.
        ValueError: `resume` names no checkpoint, an incomplete or a damaged one.
    """
    if (output / METRICS).exists():
        raise OccupiedError(
            f"{output} holds a finished run (see {output / 'report.md'}): choose another --output_dir or remove it"
        )
    # The Trainer writes its state last, so a checkpoint without it is half-written.
    checkpoints = [path for path in checkpoints_of(output) if (path / TRAINER_STATE_NAME).is_file()]
    _check_names(output, fresh=not checkpoints)
    if resume is None and checkpoints:
        newest = checkpoints[-1]
        if newest_intact(output, needed)[0] is None:
            fault = find_fault(newest, needed)
            raise OccupiedError(
                f"{output} holds {newest.name}, which cannot be continued from ({fault}): choose another --output_dir"
            )
        raise OccupiedError(
            f"{output} holds an unfinished run ({newest.name}): add --resume_from_checkpoint auto to continue "
            "it, or choose another --output_dir"
        )
    start = None
    if resume == "auto":
        start, faults = newest_intact(output, needed)
        if start is None and any(fault.endswith(WEIGHTS_ALONE) for fault in faults):
            raise OccupiedError(f"{'; '.join(faults)}: choose another --output_dir to start from the beginning")
    elif resume is not None:
        if fault := find_fault(Path(resume), needed):
            raise UsageError(f"{resume!r} is no complete checkpoint: {fault}")
        start = Path(resume)
    if start is None and (whole := whole_student(output)):
        raise OccupiedError(
            f"{output} holds a student that is whole, in {whole}: move it, or choose another --output_dir"
        )
    if mine := next(iter(_not_ours(output, step_of(start) if start and start.parent == output else -1)), None):
        raise OccupiedError(f"{output} holds {mine}, which no run has written: move it, or choose another --output_dir")
    if resume == "auto" and faults and is_main_process():
        instead = f"continuing from {start}" if start else "starting from the beginning"
        logger.warning("%s; %s", "; ".join(faults), instead)
    return start


def _check_names(output: Path, *, fresh: bool) -> None:
    """Whether what the run writes to, beside its checkpoints, is free or an earlier part of it has written it."""
    if fresh and (output / "config.json").exists():
        raise OccupiedError(f"{output} holds a model already: choose another --output_dir")
    if not aside_is_ours(output):
        raise OccupiedError(
            f"{output} holds a {INCOMPLETE}, which no run has made: move it, or choose another --output_dir"
        )
    taken = (name for name in RESULTS if os.path.lexists(output / name)) if fresh else iter(foreign(output, RESULTS))
    if found := next(taken, None):
        raise OccupiedError(f"{output} holds a {found}, which the run would overwrite: choose another --output_dir")


def _not_ours(output: Path, after: int) -> list[str]:
    """What is named as a checkpoint of a step after this one and is nothing like it."""
    named = [path for path in _named_as_checkpoints(output) if step_of(path) > after]
    return [path.name for path in named if not _is_like_a_checkpoint(path)]


def _is_like_a_checkpoint(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return not names or bool(
        names & {MANIFEST, TRAINER_STATE_NAME, "training_args.bin", "optimizer.pt", "scheduler.pt"}
    )


def check_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raises `ValueError` if `checkpoint` belongs to another run: names the first key that differs, and both values.

    A key that the checkpoint does not have, because an earlier version wrote it, is not compared; a warning names it.

    Args:
        checkpoint: its folder; one without `run.json`, of another program, is not judged.
        identity: what makes the run what it is, JSON-able, in the order in which it is compared.
    """
    path = checkpoint / RUN
    if not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    check_equal(checkpoint, saved, identity)
    untold = [key for key in identity if key not in saved]
    if untold and is_main_process():
        more = f" and {len(untold) - 4} more" if len(untold) > 4 else ""
        logger.warning(
            "%s does not say its %s: whether they are this run's cannot be told",
            checkpoint,
            ", ".join(untold[:4]) + more,
        )


def check_resume(checkpoint: Path, training: TrainingArguments) -> None:
    """Says what a run that is continued does otherwise than before.

    Raises:
        ValueError: the best model is to be loaded at the end, and its checkpoint is gone.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    if training.load_best_model_at_end and best and not Path(best).is_dir():
        raise UsageError(
            f"load_best_model_at_end: {checkpoint} has {best} for the best so far, which is not there; put it back or "
            "leave --load_best_model_at_end out"
        )
    if not is_main_process():
        return
    before, now = state.get("max_steps"), training.max_steps
    schedule = training.lr_scheduler_type
    if before and 0 < now != before and schedule not in ("constant", "constant_with_warmup"):
        logger.warning(
            "%s was on its way to %d steps, this run goes to %d: the %s schedule of the learning rate is the new one's",
            *(checkpoint, before, now, getattr(schedule, "value", schedule)),
        )
    if training.save_only_model:
        logger.warning("--save_only_model: what this run saves cannot be continued from, but when a signal stops it")


def check_equal(folder: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises `ValueError` as `check_same_run` if a value of what was saved in `folder` is not that of `identity`."""
    if (key := differing(saved, identity)) is not None:
        here = json.loads(json.dumps(identity[key]))
        raise UsageError(f"{folder} belongs to another run: its {key} is {saved[key]!r}, this run's is {here!r}")


def checkpoints_of(output: Path) -> list[Path]:
    """The folders of that name, by step, whole or not."""
    return [path for path in _named_as_checkpoints(output) if path.is_dir()]


def _named_as_checkpoints(output: Path) -> list[Path]:
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    named = [path for path in output.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_intact(output: Path, needed: Iterable[str] = ()) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of `output` without a fault, and what is wrong with each newer one."""
    faults: list[str] = []
    for checkpoint in reversed(checkpoints_of(output)):
        fault = find_fault(checkpoint, needed)
        if fault is None:
            return checkpoint, faults
        what = "cannot be continued from" if fault == WEIGHTS_ALONE else "is damaged"
        faults.append(f"{checkpoint} {what}: {fault}")
    return None, faults


def what_is_intact(output: Path) -> str:
    """Which checkpoint `newest_intact` finds, as part of a sentence."""
    intact, _ = newest_intact(output)
    return f"the newest intact checkpoint is {intact}" if intact else "there is no intact checkpoint"


def find_fault(checkpoint: Path, needed: Iterable[str] = ()) -> str | None:
    """Why a checkpoint cannot be continued from, None if it can. Reads all of its files if it has a manifest."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    if not (checkpoint / MANIFEST).exists():
        return _find_unreadable(checkpoint) or _find_missing(checkpoint, needed)
    try:
        manifest = read_manifest(checkpoint / MANIFEST)
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if digest(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return str(error)
    if manifest.get("resumable"):
        return None
    return WEIGHTS_ALONE if "resumable" in manifest else _find_missing(checkpoint, needed)


def _find_missing(checkpoint: Path, needed: Iterable[str]) -> str | None:
    """What a resume needs, under the names that one process, FSDP and DeepSpeed have for it."""
    names = {path.name for path in checkpoint.iterdir()}

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in names)

    if not has("model", "pytorch_model", "global_step"):
        return "it has no model.safetensors"
    if not has("optimizer", "scheduler", "global_step"):
        return WEIGHTS_ALONE
    if not has("optimizer", "global_step"):
        return "it has no optimizer.pt"
    if not has("scheduler", "global_step"):
        return "it has no scheduler.pt"
    if not has("rng_state"):
        return "it has no rng_state.pth"
    return next((f"it has no {name}" for name in needed if name not in names), None)


def _find_unreadable(checkpoint: Path) -> str | None:
    """Without a manifest: what is JSON must be, and no file of tensors shorter than it says of itself."""
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not _is_readable(path):
            return f"{path.name} is not readable"
    for index in checkpoint.glob("*.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        if absent := sorted(name for name in set(shards) if not (checkpoint / name).is_file()):
            return f"{absent[0]} is missing"
    return None


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):  # its directory is at its end
            torch.load(path, map_location="cpu", weights_only=True)  # in the format before torch 1.6, or cut off
    except Exception:  # of four formats, each with several errors of its own
        return False
    return True


def is_main_process() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
