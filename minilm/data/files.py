"""Which files of a folder are trained on, and which are left out.

Hidden files and documentation are no data. A name or folder like train, test-00000-of-00002 or wiki.valid tells a
split; so do names that differ in such a word alone (en_test_a beside en_train_a). Of a folder with a training split
that split is read; else what belongs to no split; what is there to test or validate never. What is to be read must be
of one kind: what else looks like data is refused, not passed over.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from minilm.data.formats import OPENERS
from minilm.data.reading import KINDS, kind_of
from minilm.errors import UsageError, reason

_TRAIN, _EVAL = ("train", "training"), ("test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation")
_WORD = re.compile(rf"(?<![a-z])({'|'.join((*_TRAIN, *_EVAL, 'heldout', 'holdout'))})\d*(?![a-z])")
_PART = r"([-_. ]?(\d+|of|set|split|data|dataset|part|shard|file|text|texts|sentences))*"  # says which, not what
_SPLIT = re.compile(rf"(?:.*[-_. ])?{_WORD.pattern}{_PART}")
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|changelog|citation|authors|contributors|requirements)s?([-_. ].*)?"
)
_ABOUT_DATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|croissant\.json|cache-[0-9a-f]+\.arrow")
_ABOUT_FILES = {".md5", ".sha1", ".sha256", ".crc", ".sig", ".asc", ".idx", ".index", ".lock", ".bak", ".swp"}
_FOREIGN = {
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".lzma", ".gz", ".bz2", ".xz", ".zst", ".z"),
    *(".feather", ".orc", ".avro", ".xls", ".xlsx", ".xml", ".pkl", ".pickle", ".h5", ".hdf5", ".db", ".sqlite"),
    *(".warc", ".wet", ".tfrecord"),
}


class Chosen(NamedTuple):
    """The files to read, in order, and what else stands in the folder, as paths below it."""

    files: list[Path]
    left_out: list[str]

    def __str__(self) -> str:
        read = [path.name for path in self.files]
        return f"read {_some(read)}" + (f", left out {_some(self.left_out)}" if self.left_out else "")


def choose_files(folder: Path) -> Chosen:
    """What `minilm.data.reading` reads of a folder and below it, as this module has it.

    Raises:
        ValueError: nothing to read, several kinds of data, files to test on alone.
        OSError: a folder that cannot be listed.
    """
    if saved := _saved_to_disk(folder):
        return saved
    files = walk(folder)
    data = [path for path in files if not _is_documentation(path) and (kind_of(path) or _looks_like_data(path))]
    if not data:
        found = f"nothing but {_some(_names(folder, files))}" if files else "none"
        raise UsageError(f"the folder {str(folder)!r} holds no data ({', '.join(KINDS)}): it holds {found}")
    chosen = _once(training_files(folder, data))
    kinds = {kind_of(path) or path.suffix: path for path in reversed(chosen)}
    if len(kinds) > 1 or not kind_of(chosen[0]):
        raise UsageError(
            f"the folder {str(folder)!r} must hold one kind of {', '.join(KINDS)} files; it holds "
            f"{_some(_names(folder, sorted(kinds.values())))}: name those to read, for example "
            f"--data {folder}/*{chosen[0].suffix}"
        )
    for path in chosen:
        if not path.is_file():
            raise UsageError(f"{str(path)!r} is no file that can be read: a broken link, or a pipe")
    return Chosen(chosen, _names(folder, [path for path in files if path not in set(chosen)]))


def training_files(folder: Path, files: list[Path]) -> list[Path]:
    """Those of the files that are trained on. Raises `ValueError` if all are there to test or validate."""
    splits = _splits(folder, files)
    train = [path for path in files if splits.get(path) in _TRAIN]
    chosen = train or [path for path in files if path not in splits]
    if not chosen:
        names = ", ".join(sorted(set(splits.values())))
        raise UsageError(
            f"the files of {str(folder)!r} are named as {names}, none as train: to train on them, name them or their "
            f"folder, for example --data {files[0]}"
        )
    return chosen


def walk(folder: Path) -> list[Path]:
    """All files in a folder and below it, sorted, but for hidden ones; links are followed, no folder twice."""
    found: list[Path] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        found += [Path(place, name) for name in names if not _is_hidden(name)]
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_documentation(path: Path) -> bool:
    name = path.name.lower()
    return bool(_ABOUT_DATA.fullmatch(name) or (kind_of(path) == "text" and _DOCUMENTATION.fullmatch(_stem(name))))


def _looks_like_data(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return bool(suffixes) and suffixes[-1] not in _ABOUT_FILES and any(s in KINDS or s in _FOREIGN for s in suffixes)


def _stem(name: str) -> str:
    """A name without the suffixes of its kind and compression."""
    while (suffix := Path(name).suffix) in OPENERS or suffix in KINDS:
        name = name.removesuffix(suffix)
    return name


def _splits(folder: Path, files: list[Path]) -> dict[Path, str]:
    """What split each file's name or folder tells, none for the others; one to test on comes before training."""
    words: dict[Path, set[str]] = {}
    patterns: dict[tuple[str, ...], list[tuple[Path, str]]] = {}
    for path in files:
        parts = [part.lower() for part in path.relative_to(folder).parts]
        parts[-1] = _stem(parts[-1])
        for place, part in enumerate(parts):
            if match := _SPLIT.fullmatch(part):
                words.setdefault(path, set()).add(match[1])
            for match in _WORD.finditer(part):
                rest = re.sub(r"[-_. ]?\d+", "", f"{part[: match.start()]}*{part[match.end() :]}")
                patterns.setdefault((*parts[:place], rest), []).append((path, match[1]))
    for alike in patterns.values():
        if any(word in _TRAIN for _, word in alike) and any(word not in _TRAIN for _, word in alike):
            for path, word in alike:
                words.setdefault(path, set()).add(word)
    return {path: min(found, key=lambda word: (word in _TRAIN, word)) for path, found in words.items()}


def _once(files: list[Path]) -> list[Path]:
    """Without a second link to a file, and without the compressed copy beside a file."""
    names = set(files)
    kept: dict[str, Path] = {}
    for path in files:
        if not (path.suffix.lower() in OPENERS and path.with_suffix("") in names):
            kept.setdefault(os.path.realpath(path), path)
    return list(kept.values())


def _saved_to_disk(folder: Path) -> Chosen | None:
    """Of a folder that `datasets`' `save_to_disk` wrote: the tables that it names, of several splits those of train."""
    if (index := folder / "dataset_dict.json").is_file():
        with _index_faults(index):
            splits = [str(split) for split in json.loads(index.read_text(encoding="utf-8"))["splits"]]
        if "train" not in splits:
            raise UsageError(
                f"the data set saved in {str(folder)!r} has the splits {', '.join(splits)}, none is train: to train on "
                f"one, name its folder, for example --data {folder / splits[0]}"
            )
        saved = _saved_to_disk(folder / "train")
        return saved and Chosen(saved.files, [f"{split}/" for split in splits if split != "train"])
    if not ((index := folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    with _index_faults(index):
        names = [file["filename"] for file in json.loads(index.read_text(encoding="utf-8"))["_data_files"]]
        return Chosen([folder / name for name in names], [])


@contextmanager
def _index_faults(index: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{str(index)!r} is not what `save_to_disk` writes ({reason(error)})") from error


def _names(folder: Path, files: Iterable[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
