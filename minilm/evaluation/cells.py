"""Finished results of a folder, one a file: what was computed once is not computed again, and never taken for another.

A cell is told by a key, whatever may change its result: the model's and the data's fingerprints and the settings. It is
written whole or not at all.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Key = dict[str, Any]  # JSON-able

FOLDER = "cells"


class Cells:
    """The results in `output/cells`. Files there of other keys are left alone."""

    def __init__(self, output: Path) -> None:
        self._folder = output / FOLDER

    def get(self, key: Key) -> dict[str, Any] | None:
        """The result of a key; None where there is none, or none that can be read."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        result: dict[str, Any] | None = found["result"] if found.get("key") == json.loads(json.dumps(key)) else None
        return result

    def put(self, key: Key, result: dict[str, Any]) -> None:
        """Raises `OSError` where it cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"key": key, "result": result}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    def _path(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:24]}.json"
