"""The report: the two tables, the card, the picture, and that metrics.json comes last; and how speeds are measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minilm.cli.report import model_card, overview, plot_curves, report_markdown, write_report
from minilm.models.speed import measure_speed

PARAMETERS = {
    "teacher": {"embedding": 23_837_184, "transformer": 85_054_464, "total": 108_891_648},
    "student": {"embedding": 11_918_592, "transformer": 10_646_784, "total": 22_565_376},
}
SPEEDS = {
    "teacher": {"sequences_per_second": 10.0, "tokens_per_second": 4000.0},
    "student": {"sequences_per_second": 53.0, "tokens_per_second": 21200.0},
}
METRICS: dict[str, Any] = {
    "objective": "minilm-v2",
    "relations": {"qq": 1.0, "vv": 0.5},
    "relation_heads": 48,
    "learns_the_end": False,
    "parts": {"qq": 1.0, "vv": 0.5},
    "auto_class": "AutoModel",
    "serves": False,
    "pooling": ["mean"],
    "sentence_files": False,
    "agreement": {
        "texts": 100,
        "neighbours": 10,
        "start": {"correlation": 0.25, "neighbours": 0.125},
        "end": {"correlation": 0.875, "neighbours": 0.5},
        "examples": [{"text": "a", "teacher": "b", "student": "b"}, {"text": "c", "teacher": "d", "student": "e"}],
    },
    "in_chain": False,
    "learns_hidden": False,
    "processor": "tokenizer",
    "training": {"tokens_per_second": 54321.0},
    "teacher_layer": 12,
    "teacher": {"name": "bert-base-uncased", "layers": 12, "hidden_size": 768, "heads": 12},
    "student": {"name": "out", "layers": 6, "hidden_size": 384, "heads": 12},
    "parameters": PARAMETERS,
    "speeds": SPEEDS,
    "speed_batch": 32,
    "data": {
        "name": "texts.txt",
        "train_sequences": 1900,
        "heldout_sequences": 100,
        "max_length": 128,
        "packed": False,
        "unit": "sequences",
        "sequences_per_step": 256,
    },
    "steps": 10,
    "steps_before_resuming": 0,
    "seconds": 90.0,
    "device": "cpu",
    "heldout": {"qq": {"start": 2.0, "end": 0.5}, "vv": {"start": 1.0, "end": 0.25}},
    "arguments": {"teacher": "bert-base-uncased", "student": None, "student_init": "auto"},
}
HISTORY = [
    {"step": 0, "eval_loss": 2.5, "eval_qq": 2.0, "eval_vv": 1.0},
    {"step": 5, "loss": 1.4, "qq": 1.1, "vv": 0.6},
    {"step": 10, "loss": 0.7, "qq": 0.6, "vv": 0.2},
    {"step": 10, "eval_loss": 0.625, "eval_qq": 0.5, "eval_vv": 0.25},
    {"step": 10, "train_loss": 1.05, "train_runtime": 90.0},
]


def cells(report: str, first: str) -> list[str]:
    row = next(line for line in report.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_the_report_tells_sizes_speeds_and_losses_of_both_models() -> None:
    report = report_markdown(Path("out"), METRICS)
    assert cells(report, "layers x hidden size") == ["12 x 768", "6 x 384", ""]
    assert cells(report, "embedding parameters") == ["23.8M", "11.9M", "0.50"]
    assert cells(report, "Transformer parameters") == ["85.1M", "10.6M", "0.13"]
    assert cells(report, "all parameters") == ["108.9M", "22.6M", "0.21"]
    assert cells(report, "sequences per second") == ["10.0", "53.0", "5.30"]
    assert cells(report, "tokens per second") == ["4,000", "21,200", "5.30"]
    assert cells(report, "qq") == ["2.0000", "0.5000", "0.25"]
    assert cells(report, "vv") == ["1.0000", "0.2500", "0.25"]
    assert "minilm-v2 (qq + 0.5 vv over 48 relation heads) on teacher layer 12: 10 steps of 256 sequences" in report
    assert "in 1.5 minutes on cpu" in report
    assert "AutoModel.from_pretrained('out')" in report


def test_the_report_tells_what_comes_out_beside_the_teacher() -> None:
    report = report_markdown(Path("out"), METRICS)
    assert "agreement with the teacher on 100 held-out texts" in report
    assert cells(report, "correlation of cosine similarities (Spearman)") == ["0.250", "0.875"]
    assert cells(report, "shared among the 10 nearest neighbours") == ["12%", "50%"]
    assert "- a\n  - teacher: b\n  - student: the same\n- c\n  - teacher: d\n  - student: e\n" in report
    images = METRICS | {"agreement": None, "processor": "image processor"}
    assert "agreement" not in report_markdown(Path("out"), images).lower()


def test_a_student_that_serves_ends_with_two_lines_that_encode() -> None:
    serving = METRICS | {"serves": True}
    assert "fine-tune the student" in report_markdown(Path("out"), METRICS)
    assert "encode" not in report_markdown(Path("out"), METRICS | {"sentence_files": True})
    for told in (report_markdown(Path("out"), serving), model_card(Path("out"), serving)):
        assert "the student serves as it is" in told
        assert "fine-tune" not in told
        *_, lines = told.split("```python")
        assert lines.splitlines()[1] == "from transformers import pipeline"
    with_files = model_card(Path("out"), serving | {"sentence_files": True})
    assert "SentenceTransformer('out').encode" in with_files
    assert "tags: [minilm, distillation, sentence-transformers]" in with_files


def test_a_resumed_runs_minutes_are_those_of_its_last_part() -> None:
    report = report_markdown(Path("out"), METRICS | {"steps_before_resuming": 4})
    assert "the last 6 in 1.5 minutes" in report


def test_a_student_that_starts_as_its_teacher_has_no_ratio() -> None:
    report = report_markdown(Path("out"), METRICS | {"heldout": {"qq": {"start": 0.0, "end": 0.0}}})
    assert cells(report, "qq") == ["0.0000", "0.0000", ""]


def test_the_overview_tells_what_is_about_to_be_trained() -> None:
    text = overview(METRICS)
    assert (
        "bert-base-uncased: 12 layers x 768, 12 heads, 108.9M parameters (23.8M embedding, 85.1M Transformer)" in text
    )
    assert "1,900 sequences of texts.txt, 100 more held out, up to 128 tokens" in text


def test_the_card_names_a_teacher_of_the_hub_and_no_folder(tmp_path: Path) -> None:
    assert "base_model: bert-base-uncased\n" in model_card(Path("out"), METRICS)
    local = METRICS | {"arguments": {"teacher": str(tmp_path)}}
    assert "base_model" not in model_card(Path("out"), local)
    assert "base_model" not in model_card(Path("out"), METRICS | {"arguments": {"teacher": None}})  # the demonstration


def test_the_curves_are_each_relations_losses_by_step() -> None:
    axes = plot_curves(["qq", "vv"], HISTORY).axes[0]
    drawn = {
        line.get_label(): [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]
        for line in axes.lines
    }
    assert drawn == {
        "QQ training": [[5, 10], [1.1, 0.6]],
        "QQ held-out": [[0, 10], [2.0, 0.5]],
        "VV training": [[5, 10], [0.6, 0.2]],
        "VV held-out": [[0, 10], [1.0, 0.25]],
    }


def test_the_curves_of_a_run_too_short_to_log_have_no_training_line() -> None:
    lines = plot_curves(["qq"], [HISTORY[0], HISTORY[3]]).axes[0].lines
    assert [line.get_label() for line in lines] == ["QQ held-out"]


def test_metrics_are_written_last_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where metrics.json stands, the run counts as finished."""
    with monkeypatch.context() as patch:
        patch.setattr("minilm.cli.report.model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(tmp_path, METRICS, HISTORY)
    assert not (tmp_path / "metrics.json").exists()
    report = write_report(tmp_path, METRICS, HISTORY)
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.json", "report.md", "curves.png", "README.md"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == METRICS
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report


def test_metrics_are_json_whatever_was_measured(tmp_path: Path) -> None:
    write_report(tmp_path, METRICS | {"training": {"tokens_per_second": float("nan")}}, HISTORY)
    read = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert read["training"] == {"tokens_per_second": None}


class Counting(nn.Module):
    """A model whose forward takes a second of a clock of its own."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, attention_mask: Tensor) -> None:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.clock[0] += 1


def test_speed_counts_sequences_and_their_tokens_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("minilm.models.speed.time.perf_counter", lambda: clock[0])
    model = Counting(clock)
    batches = [{"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}, {"attention_mask": torch.ones(4, 5)}]
    assert measure_speed(model, batches, 3.0) == {"sequences_per_second": 8 / 3, "tokens_per_second": 28 / 3}
    assert clock[0] == 4  # the warm-up, and the first batch again after the second
    assert model.training


def test_the_pace_is_told_where_it_is_known() -> None:
    def told(training: dict[str, float]) -> str:
        return report_markdown(Path("out"), {**METRICS, "training": training}).splitlines()[2]

    assert "on cpu at 54,321 tokens a second; from" in told(METRICS["training"])
    assert "on cpu at 12.5 images a second; from" in told({"images_per_second": 12.5})
    assert "on cpu; from" in told({})
