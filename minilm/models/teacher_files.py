"""Why a teacher does not load, told by its files: what is broken in its folder, what to name instead.

Looked at only after loading has failed, so that a start that succeeds pays nothing for it.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LFS = b"version https://git-lfs.github.com/spec/"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt")
_FOREIGN = {  # weights that transformers 5 does not load, by their files
    "*.gguf": "GGUF",
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "tf_model.h5": "TensorFlow",
    "model.ckpt.index": "TensorFlow",
    "flax_model*.msgpack": "Flax",
}


def explain(name: str, error: Exception, part: str = "", who: str = "teacher") -> str:
    """Why `name`, or that part of it, did not load, as the rest of a sentence: by its files, else the error's words."""
    if os.path.isfile(name):  # unlike a Path's, it says no to a name that the system does not take
        return f"it is a file: name the folder that holds it, {_flag(who)}{Path(name).parent}"
    if os.path.isdir(name) and (fault := next(_faults(Path(name), who), None)):
        return fault
    if part == "tokenizer" and os.path.isdir(name) and not any(map(list, map(Path(name).glob, _TOKENIZERS))):
        return "no tokenizer's files are there: save the one that it was trained with in that folder"
    if isinstance(error, UnpicklingError):
        return "pytorch_model.bin runs code when it is read, which is never done: save its weights as model.safetensors"
    return one_line(error)


def one_line(error: Exception) -> str:
    """An error of a foreign library in one line, with its type where that tells more than the words."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    told = isinstance(error, OSError | ValueError | ImportError | RuntimeError) and line
    return line if told else f"{type(error).__name__} {line}".strip()


def _flag(who: str) -> str:
    """What a folder is named by: a teacher or student by its flag, a model that is judged by its place alone."""
    return "" if who == "model" else f"--{who} "


def _faults(folder: Path, who: str) -> Iterator[str]:
    yield from _broken(folder)
    yield from _not_a_model(folder, who)
    yield from _incomplete(folder)


def _broken(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            yield f"{path.name} is a link to {path.readlink()}, which is not there"
        if not path.is_file() or path.suffix not in (".json", ".safetensors", ".bin", ".model"):
            continue
        if not os.access(path, os.R_OK):
            yield f"{path.name} may not be read: permission denied"
            continue
        size = path.stat().st_size
        if not size:
            yield f"{path.name} is empty"
        elif _starts_with(path, _LFS):
            yield f"{path.name} is a Git LFS pointer of {size} bytes, not the file: fetch it with `git lfs pull`"
        elif path.suffix == ".json":
            yield from _no_json(path)
        elif path.suffix == ".safetensors":
            yield from _no_safetensors(path, size)
        elif path.suffix == ".bin" and not _starts_with(path, b"PK\x03\x04", b"\x80"):  # a zip or, older, a pickle
            yield f"{path.name} ({size:,} bytes) holds no weights that PyTorch has saved"
        elif (
            path.suffix == ".bin" and _starts_with(path, b"PK") and not is_zipfile(path)
        ):  # its directory is at the end
            yield f"{path.name} ends after {size:,} bytes, before its end: is its download complete?"


def _no_json(path: Path) -> Iterator[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"{path.name} is no JSON: {error}"
        return
    except RecursionError:
        yield f"{path.name} holds JSON that is nested too deeply"
        return
    if not isinstance(content, dict):
        return  # which of them may be lists is theirs to know
    if path.name.endswith(".index.json"):
        shards = content.get("weight_map")
        if not isinstance(shards, dict):
            yield f"{path.name} has no weight_map"
            return
        for shard in sorted(set(map(str, shards.values()))):
            if not (path.parent / shard).is_file():
                yield f"{path.name} names {shard}, which is not there"
    if path.name == "tokenizer.json":
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:
            yield f"{path.name} holds no tokenizer: {one_line(error).removeprefix('Exception ')}"


def _no_safetensors(path: Path, size: int) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        reason = one_line(error)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        wanted = 8 + length + max(tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        yield f"{path.name} ({size:,} bytes) is no safetensors file: {reason}"
        return
    if wanted == size:
        yield f"{path.name} is damaged: {reason}"
    else:
        yield f"{path.name} has {size:,} bytes where its header tells of {wanted:,}: is its download complete?"


def _not_a_model(folder: Path, who: str) -> Iterator[str]:
    """What the folder is instead of a model's, with the folder to name."""
    if (folder / "adapter_config.json").is_file():
        yield (
            "it holds a PEFT adapter: merge it into its model (merge_and_unload), save that with its tokenizer, and "
            "name that folder"
        )
    config = _read(folder / "config.json")
    model_type = config.get("model_type")
    if model_type is None:
        yield from _models_within(folder, who)
        if "auto_map" not in config:
            foreign = _foreign(folder)
            if foreign:
                yield f"it holds {foreign}, which transformers does not load"
            elif not (folder / "config.json").is_file():
                yield "it holds no config.json, so no model of transformers"
            else:
                yield "its config.json names no model_type, so it is no model of transformers"
            return
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        yield (
            f"its model is custom code (model_type {model_type!r}), which is never run: name a checkpoint of a "
            f"model_type that transformers {transformers.__version__} has itself"
        )
    else:
        yield (
            f"its model_type {model_type!r} is unknown to transformers {transformers.__version__}: a newer one may "
            "know it (pip install -U transformers)"
        )


def _models_within(folder: Path, who: str) -> Iterator[str]:
    """Checkpoints of a Trainer, the Transformer of an older sentence-transformers folder, a snapshot of the hub."""
    found = [
        path.parent
        for pattern in ("*/config.json", "snapshots/*/config.json")
        for path in sorted(folder.glob(pattern))
        if "model_type" in _read(path)
    ]
    if not found:
        return
    steps = {path: int(number) for path in found if (number := path.name.removeprefix("checkpoint-")).isdecimal()}
    if steps:
        last = max(steps, key=steps.__getitem__)
        yield f"it holds checkpoints, and no model beside them: name one, {_flag(who)}{last}"
    elif (folder / "modules.json").is_file():
        yield f"it is a sentence-transformers folder: name its Transformer, {_flag(who)}{found[0]}"
    else:
        others = f" (or {', '.join(str(path) for path in found[1:])})" if found[1:] else ""
        yield f"the model is in a folder below it: {_flag(who)}{found[0]}{others}"


def _incomplete(folder: Path) -> Iterator[str]:
    config = _read(folder / "config.json")
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    if foreign := _foreign(folder):
        yield f"it holds {foreign}, and neither model.safetensors nor pytorch_model.bin, which transformers loads"
        return
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    model_type = config["model_type"]
    beside = f", only {others[0]}" if others else ""
    yield f"it holds the config.json of a {model_type}, but neither model.safetensors nor pytorch_model.bin{beside}"


def _foreign(folder: Path) -> str | None:
    for pattern, file_format in _FOREIGN.items():
        for path in sorted(folder.glob(pattern)):
            return f"{file_format} weights ({path.relative_to(folder)})"
    return None


def _starts_with(path: Path, *beginnings: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(max(map(len, beginnings))).startswith(beginnings)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
