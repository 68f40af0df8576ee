"""Imports go down only: a table says what each floor of the project may import of it."""

import ast
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"minilm": ROOT, "minilm_kernels": ROOT / "kernels"}
KERNELS_NEED = {"torch", "triton"}

# The lowest floor is three modules that all others need: the errors that end a run wherever they rise, escapes, and
# which numbers are in range. Models and data are siblings: what passes between them is a batch, a dictionary of
# tensors.
LOWEST = {"minilm.errors", "minilm.escapes", "minilm.values"}
KERNELS = LOWEST | {"minilm_kernels"}
MODELS = KERNELS | {"minilm.models"}
DATA = KERNELS | {"minilm.data"}
OBJECTIVES = MODELS | {"minilm.objectives"}
TRAINING = OBJECTIVES | DATA | {"minilm.training"}
EVALUATION = MODELS | DATA | {"minilm.evaluation"}  # judges what any training left
CLI = TRAINING | EVALUATION | {"minilm.cli"}
MAY_IMPORT = {
    "minilm": CLI,  # its public names
    "minilm.cli": CLI,
    "minilm.training": TRAINING,
    "minilm.evaluation": EVALUATION,
    "minilm.objectives": OBJECTIVES,
    "minilm.models": MODELS,
    "minilm.data": DATA,
    "minilm.errors": LOWEST,
    "minilm.escapes": LOWEST,
    "minilm.values": LOWEST,
    "minilm_kernels": {"minilm_kernels"},
}


def floor_of(module: str) -> str:
    """The first two names of a module of minilm, else the first."""
    names = module.split(".")
    return ".".join(names[: 2 if names[0] == "minilm" else 1])


def imported_by(source: str, package: str) -> Iterator[str]:
    """Modules that the source of a module in `package` imports, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if name in MAY_IMPORT else module for name in names)


def forbidden(floor: str, package: str, source: str) -> list[str]:
    """What a module of this floor imports and may not."""

    def may(imported: str) -> bool:
        root = imported.partition(".")[0]
        if root in SOURCES:
            return floor_of(imported) in MAY_IMPORT[floor]
        return floor != "minilm_kernels" or root in KERNELS_NEED | sys.stdlib_module_names

    return [imported for imported in imported_by(source, package) if not may(imported)]


@pytest.mark.parametrize("package", SOURCES)
def test_imports_go_down(package: str) -> None:
    found = {}
    for path in (SOURCES[package] / package).rglob("*.py"):
        parent = ".".join(path.parent.relative_to(SOURCES[package]).parts)
        module = parent if path.stem == "__init__" else f"{parent}.{path.stem}"
        found[module] = forbidden(floor_of(module), parent, path.read_text(encoding="utf-8"))
    assert len(found) > 10
    assert {floor_of(module) for module in found} <= MAY_IMPORT.keys()  # a module at the top of minilm is a new floor
    assert {module: imports for module, imports in found.items() if imports} == {}


@pytest.mark.parametrize(
    ("floor", "line"),
    [
        ("minilm.models", "from minilm.training.trainer import DistillationTrainer"),
        ("minilm.models", "from minilm import DistillationTrainer"),  # by its public name
        ("minilm.models", "from ..training import trainer"),
        ("minilm.models", "from minilm import data"),
        ("minilm.data", "def f() -> None:\n    import minilm.models.capture"),
        ("minilm.objectives", "if TYPE_CHECKING:\n    from minilm.data.packing import Row"),
        ("minilm.training", "from minilm.cli.report import overview"),
        ("minilm.errors", "from minilm.values import find_fault; import minilm.models"),
        ("minilm_kernels", "from minilm.errors import reason"),
        ("minilm_kernels", "import torch, math, transformers"),
    ],
)
def test_a_step_up_is_found(floor: str, line: str) -> None:
    assert len(forbidden(floor, floor, line)) == 1


LONGEST_FILE, LONGEST_FUNCTION = 350, 60  # lines, docstrings among them


def too_long(source: str) -> list[tuple[str, int]]:
    """The file, and its functions, with their lines, where these are too many."""
    lines = len(source.splitlines())
    functions = [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [("file", lines)] * (lines > LONGEST_FILE) + [pair for pair in functions if pair[1] > LONGEST_FUNCTION]


def test_files_and_functions_are_short() -> None:
    paths = {path.relative_to(ROOT / "minilm").as_posix(): path for path in (ROOT / "minilm").rglob("*.py")}
    found = {name: too_long(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    assert len(found) > 10
    assert {path: long for path, long in found.items() if long} == {}


def test_what_is_too_long_is_found() -> None:
    body = "    x = 0\n"
    assert too_long("def f():\n" + body * 59) == []
    assert too_long("class A:\n  def f(self):\n" + body * 60) == [("f", 61)]
    assert too_long("x = 0\n" * 351) == [("file", 351)]


def test_folders_hold_nothing_of_their_own() -> None:
    """Importing one module of a folder imports no other: `import minilm` and the loss stay light."""
    for path in (ROOT / "minilm").glob("*/__init__.py"):
        if path.parent.name != "cli":  # the console script's entry is `minilm.cli:main`
            assert [type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body] == [ast.Expr], path
