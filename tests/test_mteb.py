"""Tasks of MTEB stand beside the others, scored by mteb itself; without it one line says so."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from tiny_tasks import pairs, write_glue

from minilm.cli import evaluate
from minilm.evaluation import mteb_tasks


def run(*argv: str) -> int:
    return evaluate.main([*argv, "--output_dir", "out"])


def test_without_mteb_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], teacher: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mteb_tasks, "find_spec", lambda name: None)
    capsys.readouterr()
    assert run(teacher, "--tasks", "mteb:STSBenchmark") == 1
    assert run(teacher, "--tasks", "mteb:STSBenchmark", "--protocol", "quick") == 2
    assert capsys.readouterr().err == (
        "minilm-eval: error: the task 'mteb:STSBenchmark' needs mteb, which is not installed: pip install mteb\n"
        "minilm-eval: error: 'mteb:STSBenchmark' is of frozen vectors: --protocol probe, not quick\n"
    )


@pytest.mark.filterwarnings("default")  # mteb calls sentence-transformers by names that are going
def test_mteb_scores_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], teacher: str
) -> None:
    mteb = pytest.importorskip("mteb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilm.evaluation.judged.SECONDS", 0.02)
    get_task = mteb.get_task
    monkeypatch.setattr(mteb, "get_task", lambda name: _in_memory(mteb) if name == "Tiny" else get_task(name))
    write_glue(tmp_path / "data")
    assert run(teacher, "--tasks", "mteb:Tiny,stsb", "--data_dir", "data") == 0
    everything = json.loads(Path("out/eval.json").read_text())
    found = everything["models"]["teacher"]["scores"]["mteb:Tiny"]
    columns = [[record[name] for record in pairs(20)] for name in ("sentence1", "sentence2", "label")]
    theirs = EmbeddingSimilarityEvaluator(*columns, similarity_fn_names=["cosine"])(SentenceTransformer(teacher))
    assert found == {"test": {"cosine_spearman": pytest.approx(100 * theirs["spearman_cosine"], abs=0.01)}}
    assert everything["tasks"]["mteb:Tiny"] == {"data": "own/tiny", "revision": "1", "mteb": mteb.__version__}
    assert f"- mteb:Tiny: as mteb {mteb.__version__} learns and scores it." in Path("out/eval.md").read_text()
    capsys.readouterr()
    assert run(teacher, "--tasks", "mteb:STSBench") == 2
    assert "mteb has no such task: 'STSBench' not found" in capsys.readouterr().err


def _in_memory(mteb: Any) -> Any:
    from mteb.abstasks.sts import AbsTaskSTS

    about = {
        **{"name": "Tiny", "type": "STS", "description": "", "main_score": "cosine_spearman", "bibtex_citation": ""},
        **{"dataset": {"path": "own/tiny", "revision": "1"}, "eval_splits": ["test"], "eval_langs": ["eng-Latn"]},
    }

    class Tiny(AbsTaskSTS):  # type: ignore[misc]
        metadata = mteb.TaskMetadata(**about)
        min_score, max_score = 0, 3

        def load_data(self, **_: Any) -> None:
            rows = [{**pair, "score": pair["label"]} for pair in pairs(20)]
            self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
            self.data_loaded = True

    return Tiny()
