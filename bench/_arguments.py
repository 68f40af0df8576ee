"""What the command lines of this folder have in common."""

import argparse
from pathlib import Path

from _results import RESULTS


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Its help starts with the script's docstring as it stands. Flags are not abbreviated."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")


def add_commit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commit", help="commit to write down where git does not know it")


def positive(text: str) -> int:
    """An int of a flag, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
