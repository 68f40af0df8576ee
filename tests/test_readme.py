"""The README's Python runs as it stands, and its file tree names every module."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_loop_runs_and_trains_the_student() -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 21
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code.replace("optimizer.zero_grad()", "pass"), "README.md", "exec"), names)
    student = names["student"]
    assert isinstance(student, torch.nn.Module)
    word_embeddings = student.get_parameter("embeddings.word_embeddings.weight")
    assert word_embeddings.grad is not None
    assert word_embeddings.grad.norm() > 0


def test_file_tree_names_every_module() -> None:
    tree = README.split("## Files")[1]
    modules = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "minilm").rglob("*.py")]
    missing = [path.name for path in modules if path.name != "__init__.py" and path.name not in tree]
    assert not missing
