"""A model learns to answer questions about sentences, and to say that they have no answer."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_answers import save_reader, tiny_answers

from minilm.evaluation.finetuning import finetune
from minilm.evaluation.settings import Settings
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.tasks import TASKS

SETTINGS = Settings(learning_rate=3e-3, epochs=4, batch_size=16, use_cpu=True)


@pytest.fixture(autouse=True)
def no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_reader(tmp_path_factory.mktemp("reader")))


def data(count: int, unanswerable: float) -> TaskData:
    validation = tiny_answers(200, seed=1, unanswerable=unanswerable)
    name = "squad_v2" if unanswerable else "squad"
    return TaskData(TASKS[name], tiny_answers(count, 0, unanswerable), {"validation": validation}, ())


def test_answers_are_learnt(reader: str, tmp_path: Path) -> None:
    """Taking the person, the city or the year, whatever is asked for, is right once in three."""
    untrained = finetune(reader, data(16, 0), Settings(learning_rate=0, epochs=1, use_cpu=True), tmp_path)
    assert untrained.keys() == {"validation"}
    assert list(untrained["validation"]) == ["f1", "exact"]  # as the task names them
    assert untrained["validation"]["f1"] < 40
    trained = finetune(reader, data(1000, 0), SETTINGS, tmp_path)["validation"]
    assert min(trained.values()) > 95


def test_questions_without_answer_are_learnt_from_windows(reader: str, tmp_path: Path) -> None:
    """Sentences of seven words are cut into two windows, of six words and three of them at least."""
    settings = Settings(learning_rate=3e-3, epochs=6, batch_size=16, max_length=11, use_cpu=True)
    scores = finetune(reader, data(1000, 0.3), settings, tmp_path)["validation"]
    assert min(value for name, value in scores.items() if not name.endswith("threshold")) > 90
    assert next(iter(scores)) == "f1"
    assert scores["best_f1"] >= scores["f1"]


def test_a_model_of_fewer_positions_reads_shorter_windows(tmp_path: Path) -> None:
    reader = str(save_reader(tmp_path / "short", max_position_embeddings=11))
    scores = finetune(reader, data(16, 0), Settings(epochs=1, use_cpu=True), tmp_path)
    assert scores["validation"].keys() == {"exact", "f1"}
