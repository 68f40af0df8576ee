"""The packages as installed: light imports, no triton where it is not used, types, doctests."""

import doctest
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

import minilm_kernels

HEAVY = ("transformers", "datasets", "accelerate", "triton", "matplotlib", "pandas", "pyarrow")
LOSS = "x = torch.eye(4).reshape(1, 1, 4, 4).requires_grad_(); fused_minilm_loss((x, x, x), (x, x, 2 * x)).backward()"


def run(program: str) -> list[str]:
    """Printed lines of a fresh process where triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_imports_are_light() -> None:
    program = f"""
import sys, minilm
import torch
report = lambda: print([name for name in {HEAVY} if name in sys.modules], torch.cuda.is_initialized())
report()
from minilm import MiniLMLoss, fused_minilm_loss, relation_kl
{LOSS}
report()"""
    assert run(program) == ["[] False", "[] False"]


def test_works_without_triton() -> None:
    """Its name is then an error, as nothing falls back."""
    program = f"""
import sys
import tomllib
sys.modules["triton"] = None
import torch
from minilm import fused_minilm_loss
{LOSS}
print(x.grad.isfinite().all().item())
try: fused_minilm_loss((x, x, x), (x, x, x), implementation="triton")
except ValueError as error: print(error)"""
    finite, error = run(program)
    assert finite == "True"
    assert "triton" in error


def test_kernels_is_no_package() -> None:
    """kernels/__init__.py would shadow Hugging Face's `kernels`, which transformers imports."""
    package = Path(minilm_kernels.__file__).parent
    assert not (package.parent / "__init__.py").exists()
    if package.parent.name == "kernels":
        (found,) = run("import importlib.util; print(importlib.util.find_spec('kernels'))")
        assert str(package.parent / "__init__.py") not in found


@pytest.mark.parametrize("package", ["minilm", "minilm_kernels"])
def test_is_typed(package: str) -> None:
    assert (files(package) / "py.typed").is_file()


@pytest.mark.parametrize("module", ["minilm_kernels._reference", "minilm_kernels._loss", "minilm.objectives.loss"])
def test_doctests(module: str) -> None:
    result = doctest.testmod(import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def test_public_names() -> None:
    minilm = import_module("minilm")
    assert {"fused_minilm_loss", "relation_kl", "MiniLMLoss"} <= set(minilm.__all__)
    assert minilm.fused_minilm_loss is minilm_kernels.fused_minilm_loss
    with pytest.raises(AttributeError, match="no_such_name"):
        minilm.no_such_name  # noqa: B018


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert import_module("minilm").__version__ == project["version"]


def test_public_names_are_not_shadowed_by_modules() -> None:
    """Importing a module sets an attribute of the package, which must not be a function's name."""
    assert not [name for name in import_module("minilm").__all__ if find_spec(f"minilm.{name}")]
