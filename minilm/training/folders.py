"""What a run may touch in its output folder: its own files, told by a record of them and never by their names.

    _incomplete/       what is being written; ours if our mark is in it, and removed by the next start
    _incomplete/student/ with its manifest: a student that is whole, not yet in its place
    checkpoint-N/      ours to replace or remove if each of its files is in its manifest and the run is the same
    .minilm.json       size and SHA-256 of each file that a run has put beside its checkpoints

Nothing else is removed or overwritten. Files come to their place by a hard link, which never replaces one.
"""

import errno
import fcntl
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minilm.training.manifests import (
    MANIFEST,
    RUN,
    Entries,
    differing,
    digest,
    entries,
    files_of,
    read_manifest,
    sync,
)

INCOMPLETE = "_incomplete"  # the Trainer pushes nothing to the hub that begins with an underscore
MARK = ".minilm"  # made first and removed last, so that what a kill leaves of `_incomplete` is known as ours
STUDENT = "student"
RECORD = ".minilm.json"
logger = logging.getLogger(__name__)
_claims: set[int] = set()  # descriptors


class OccupiedError(Exception):
    """The output folder cannot be this run's: something in it is not, another run writes there, or nobody may."""


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """The folder is made, and is this process's alone while entered. What was made and is still empty goes at the end.

    The system gives the claim back when the process ends, however it does. Some network file systems have no such
    claims; a warning says so.

    Raises:
        OccupiedError: another process has claimed it; it cannot be made or written into.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output):
                pass
            descriptor = os.open(output, os.O_RDONLY)
        except OSError as error:
            raise OccupiedError(f"cannot write into the output folder {output}: {error.strerror}") from error
        _claims.add(descriptor)
        try:
            _lock(descriptor, output)
            yield
        finally:
            _claims.discard(descriptor)
            os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty, or never made
            for path in made:
                path.rmdir()


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OccupiedError(
            f"another run is writing into {output}: wait for it or choose another --output_dir"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be claimed (%s): see that no other run writes there", output, error.strerror)


def _leave_claims_to_the_parent() -> None:
    # A data loader's worker may outlive the run's process, and the claim would live on with it.
    for descriptor in _claims:
        os.close(descriptor)
    _claims.clear()


os.register_at_fork(after_in_child=_leave_claims_to_the_parent)


def aside_is_ours(output: Path) -> bool:
    """Whether `_incomplete` is not there, or is a run's, or is empty."""
    aside = output / INCOMPLETE
    if not os.path.lexists(aside):
        return True
    return not aside.is_symlink() and aside.is_dir() and ((aside / MARK).exists() or not any(aside.iterdir()))


def open_aside(output: Path) -> Path:
    """A new `_incomplete`; what a run has left in it is removed. Raises `FileExistsError` if it is not a run's."""
    close_aside(output)
    aside = output / INCOMPLETE
    if os.path.lexists(aside):
        raise FileExistsError(errno.EEXIST, "there is a file or folder that no run of ours has made", str(aside))
    aside.mkdir(parents=True)
    (aside / MARK).touch()
    return aside


def close_aside(output: Path) -> None:
    """Removes `_incomplete`, if it is a run's."""
    aside = output / INCOMPLETE
    if not os.path.lexists(aside) or not aside_is_ours(output):
        return
    for path in aside.iterdir():
        if path.name != MARK:
            _remove(path)
    (aside / MARK).unlink(missing_ok=True)
    aside.rmdir()


def is_own(checkpoint: Path, identity: dict[str, Any] | None) -> bool:
    """Whether a run of this identity has written everything that is in a checkpoint's folder."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return False
    try:
        written = {*read_manifest(checkpoint / MANIFEST)["files"], MANIFEST}
        run = checkpoint / RUN
        saved = json.loads(run.read_text(encoding="utf-8")) if identity is not None and run.exists() else {}
    except (OSError, ValueError):
        return False
    return written.issuperset(files_of(checkpoint)) and differing(saved, identity or {}) is None


def make_way(path: Path) -> None:
    """Renames what stands there to a free name, PATH.kept."""
    names = (f"{path.name}.kept{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
    kept = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    path.rename(kept)
    logger.warning("%s was not written by this run, which comes to that name: it is %s now", path, kept)


def whole_student(output: Path) -> Path | None:
    """The student that a run has saved whole and not put in its place, if there is one."""
    student = output / INCOMPLETE / STUDENT
    return student if aside_is_ours(output) and (student / MANIFEST).is_file() else None


def foreign(output: Path, names: Iterable[str]) -> list[str]:
    """Those of the names under which there is something that no run has written, or that was changed since."""
    record = _record(output)
    found = [name for name in names if os.path.lexists(output / name)]
    return [
        name for name in found if not ((output / name).is_file() and _is_as_recorded(output / name, record.get(name)))
    ]


def _is_as_recorded(path: Path, entry: dict[str, Any] | None) -> bool:
    return entry is not None and path.stat().st_size == entry["size"] and digest(path) == entry["sha256"]


def publish(part: Path, output: Path, *, last: str | None = None, all_or_none: bool = False) -> list[str]:
    """Puts the files of `part` into `output`; those of an earlier run are replaced.

    They stay in `part` too. The record is written before the first of them comes.

    Args:
        last: the file that comes after all others.
        all_or_none: where one cannot come to its place, none does.

    Returns:
        The names under which something else stands, which was left alone.
    """
    names = sorted((name for name in files_of(part) if name != MANIFEST), key=lambda name: (name == last, name))
    in_the_way = foreign(output, names)
    if in_the_way and all_or_none:
        return in_the_way
    names = [name for name in names if name not in in_the_way]
    for name in names:
        (output / name).unlink(missing_ok=True)
    record = {name: entry for name, entry in _record(output).items() if name not in names}
    new = part.parent / RECORD
    new.write_text(json.dumps({"files": record | entries(part, names)}, indent=1), encoding="utf-8")
    new.replace(output / RECORD)
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        _place(part / name, output / name)
    sync(output)
    return in_the_way


def _record(output: Path) -> Entries:
    try:
        files: Entries = read_manifest(output / RECORD)["files"]
    except (OSError, ValueError):
        return {}
    return files


def _place(source: Path, target: Path) -> None:
    """Raises `FileExistsError` if something is there."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with source.open("rb") as content, target.open("xb") as copy:
            shutil.copyfileobj(content, copy)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
