"""Recipes: files of flags for `minilm-train`, with comments that name their sources; later flags override a recipe's.

A line holds flags as a shell would read them, "#" begins a comment, and the first line is the title.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from minilm.errors import UsageError

FOLDER = Path(__file__).parent / "recipes"


def expand(argv: Sequence[str]) -> list[str]:
    """The command line with the flags of `--recipe NAME|FILE` in front of all others.

    Raises:
        ValueError: no such recipe or file, or two of them.
    """
    chosen, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag == "--recipe":
            chosen.append(value if equals else next(arguments, ""))
        else:
            rest.append(argument)
    if len(chosen) > 1:
        raise UsageError(f"one --recipe at a time, got {' and '.join(chosen)}")
    return [*_flags(chosen[0]), *rest] if chosen else rest


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.txt"))


def listing() -> str:
    """Every recipe of the package with its title, a line each."""
    width = max(map(len, names()))
    return "\n".join(f"{name:<{width}}  {_title(FOLDER / f'{name}.txt')}" for name in names())


def _title(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _flags(name: str) -> list[str]:
    file = FOLDER / f"{name}.txt" if name in names() else Path(name)
    if not name or not os.path.isfile(file):  # a Path's raises where the name is too long
        raise UsageError(f"there is no recipe or file {name!r}; the recipes: {', '.join(names())}")
    try:
        flags = shlex.split(file.read_text(encoding="utf-8"), comments=True)
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read the recipe {name!r}: it is no text in UTF-8") from error
    except (ValueError, OSError) as error:  # a quotation without an end; a file that may not be read
        raise UsageError(f"cannot read the recipe {name!r}: {error}") from error
    if any(flag.partition("=")[0] == "--recipe" for flag in flags):
        raise UsageError(f"the recipe {name!r} names another one with --recipe: write its flags out")
    return flags
