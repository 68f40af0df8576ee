"""The README's Python runs as it stands, and its file tree names every module."""

import csv
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from _results import read_csv  # noqa: E402
from systems_bench import MEASURED, SystemRow, markdown  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_loop_runs_and_trains_the_student() -> None:
    code = EXAMPLES[0]
    assert len(code.splitlines()) <= 21
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code.replace("optimizer.zero_grad()", "pass"), "README.md", "exec"), names)
    student = names["student"]
    assert isinstance(student, torch.nn.Module)
    word_embeddings = student.get_parameter("embeddings.word_embeddings.weight")
    assert word_embeddings.grad is not None
    assert word_embeddings.grad.norm() > 0


def test_trainer_example_runs_and_saves_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    code = EXAMPLES[1].replace('report_to="none"', 'report_to="none", use_cpu=True, disable_tqdm=True')
    names: dict[str, object] = {}
    exec(compile(code.replace("docstrings()[:64]", "['some text', 'and more']"), "README.md", "exec"), names)
    datasets.enable_progress_bars()
    student = AutoModel.from_pretrained(tmp_path / "student")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (3, 192)
    assert len(EXAMPLES) == 4  # the last but one is the demonstration's


def test_sentence_transformers_example_runs_and_saves_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = EXAMPLES[3].replace('report_to="none"', 'report_to="none", use_cpu=True, disable_tqdm=True')
    names: dict[str, object] = {}
    exec(compile(code.replace("docstrings()[:64]", "['some text', 'and more']"), "README.md", "exec"), names)
    assert SentenceTransformer("student")[0].auto_model.config.num_hidden_layers == 3


def test_file_tree_names_every_module() -> None:
    """Under each folder stand its modules, and no others."""
    tree = re.findall(r"^(\S+/)  .*\n {8,}(.*)$", README.split("## Files")[1], flags=re.MULTILINE)
    modules: dict[str, list[str]] = {}
    for path in [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "minilm").rglob("*.py")]:
        if not path.name.startswith("__"):
            modules.setdefault(f"{path.parent.relative_to(ROOT).as_posix()}/", []).append(path.stem)
    assert {folder: names.split() for folder, names in tree} == {
        folder: sorted(names) for folder, names in modules.items()
    }


def test_no_section_stands_twice() -> None:
    for readme in (README, (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")):
        headings = re.findall(r"^#+ .*$", readme, flags=re.MULTILINE)
        assert len(headings) == len(set(headings)) > 3


def test_costs_of_the_systems_are_those_that_were_measured() -> None:
    rows = read_csv(SystemRow, ROOT / "bench" / "results" / "systems_cpu.csv")
    assert {row.system for row in rows} == MEASURED.keys()
    told = README.split("<!-- systems -->\n")[1].split("\n<!-- end of systems -->")[0]
    assert told == markdown(rows)


def test_figures_of_the_h200_are_those_that_were_measured() -> None:
    with (ROOT / "bench" / "results" / "loss_bench_h200.csv").open(newline="") as file:
        rows = {
            (row["case"], int(row["N"]), row["provider"]): row
            for row in csv.DictReader(file)
            if (row["mode"], row["dtype"]) == ("both", "bf16")
        }

    def cell(key: tuple[str, int, str], column: str, form: str) -> str:
        value = rows.get(key, {}).get(column)
        return format(float(value), form) if value else "–"

    lines = []
    for case, name in (("v1-384", "v1"), ("v2-48", "v2, 48 heads")):
        for n in (128, 512, 2048, 8192):
            times = [cell((case, n, provider), "ms_p50", ".2f") for provider in ("fused", "compile", "flash", "eager")]
            memory = [cell((case, n, provider), "peak_mib", ",.0f") for provider in ("fused", "eager")]
            floor = cell((case, n, "fused"), "pct_of_floor", ".0f") + " %"
            lines.append(f"| {' | '.join([name, format(n, ','), *times, floor, *memory])} |")
    assert re.findall(r"<!-- h200 -->\n(.*?)\n<!-- end of h200 -->", README, re.S) == ["\n".join(lines)]
