"""Manifests: the size and SHA-256 of each file that a run has written into a folder, and what run it was."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST, RUN = "manifest.json", "run.json"
Entries = dict[str, dict[str, Any]]  # file's name in its folder: {"size", "sha256"}


def read_manifest(path: Path) -> dict[str, Any]:
    """{"files": Entries}, of a checkpoint "resumable": bool too. Raises OSError, and ValueError if unreadable."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{path} is no manifest")
    return manifest


def files_of(folder: Path) -> list[str]:
    """The names of all files in a folder and its folders, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def entries(folder: Path, names: Iterable[str]) -> Entries:
    """What a manifest says of these files."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in names}


def write_manifest(folder: Path, **more: Any) -> None:
    """Writes the manifest of all files that are there now, and has the disk take everything before it returns."""
    names = files_of(folder)
    for name in names:
        sync(folder / name)
    content = {"files": entries(folder, names), **more}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)


def sync(path: Path) -> None:
    """Returns when the disk has the file's content, or the folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing(saved: dict[str, Any], identity: dict[str, Any]) -> str | None:
    """The first key that both have with values that differ, None if there is none."""
    wanted = json.loads(json.dumps(identity))  # as it would be read back: tuples are lists
    return next((key for key in wanted if key in saved and saved[key] != wanted[key]), None)
