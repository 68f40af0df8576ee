"""Frozen vectors: what sentence-transformers and scikit-learn make of them, each text encoded once, no task in vain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import matthews_corrcoef
from sklearn.preprocessing import StandardScaler
from tiny_tasks import pairs, sentences, write_split
from tiny_text import save_teacher, tiny_tokenizer
from transformers import AutoModel

from minilm.errors import UsageError
from minilm.evaluation.encoders import Encoder
from minilm.evaluation.own_tasks import Columns, own_task
from minilm.evaluation.probes import probe, why_no_probe
from minilm.evaluation.task_data import TaskData, read_task
from minilm.evaluation.tasks import TASKS

WIDTH = 5


class Vectors:
    """A vector for each text, drawn when it is first asked for."""

    def __init__(self) -> None:
        self.of: dict[str, np.ndarray] = {}
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Any:
        self.asked += texts
        for text in texts:
            draw = np.random.default_rng(sum(text.encode()) + len(text))
            self.of.setdefault(text, draw.normal(size=WIDTH).astype(np.float32))
        return np.stack([self.of[text] for text in texts])

    def column(self, records: Any, column: str) -> Any:
        return np.stack([self.of[text] for text in records[column]])


def pair_task(tmp_path: Path) -> TaskData:
    for split, count in (("train", 40), ("validation", 30)):
        records = [{**record, "label": i % 3 // 2} for i, record in enumerate(pairs(count))]
        write_split(tmp_path / "mrpc", f"{split}.jsonl", records)
    return read_task(TASKS["mrpc"], tmp_path)


def test_classes_of_pairs_come_from_logistic_regression(tmp_path: Path) -> None:
    data, vectors = pair_task(tmp_path), Vectors()
    found = probe(vectors, data)
    assert len(vectors.asked) == len(set(vectors.asked))  # each distinct text once

    def features(records: Any) -> Any:
        u, v = (vectors.column(records, column) for column in data.task.texts)
        return np.hstack([u, v, abs(u - v), u * v])

    scaler = StandardScaler().fit(features(data.train))
    learnt = LogisticRegression(tol=1e-6, max_iter=5000).fit(
        scaler.transform(features(data.train)), data.train["label"][:]
    )
    records = data.evaluated["validation"]
    right = learnt.predict(scaler.transform(features(records))) == np.array(records["label"])
    assert found["validation"]["accuracy"] == pytest.approx(100 * right.mean())
    assert list(found["validation"]) == ["f1", "accuracy"]
    assert 40 < found["validation"]["accuracy"] < 100


def test_classes_of_single_texts_come_from_their_vectors(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("validation", 60)):
        write_split(tmp_path / "cola", f"{split}.jsonl", sentences(60, first))
    data, vectors = read_task(TASKS["cola"], tmp_path), Vectors()
    found = probe(vectors, data)["validation"]
    u = [vectors.column(split, "sentence") for split in (data.train, data.evaluated["validation"])]
    scaler = StandardScaler().fit(u[0])
    learnt = LogisticRegression(tol=1e-6, max_iter=5000).fit(scaler.transform(u[0]), data.train["label"][:])
    predicted = learnt.predict(scaler.transform(u[1]))
    assert found["matthews"] == pytest.approx(100 * matthews_corrcoef(data.evaluated["validation"]["label"], predicted))


def test_amounts_of_pairs_are_cosines_as_sentence_transformers_has_them(tmp_path: Path, teacher: str) -> None:
    write_split(tmp_path / "stsb", "validation.jsonl", pairs(30))  # nothing to learn from
    data = read_task(TASKS["stsb"], tmp_path)
    records = data.evaluated["validation"]
    columns = [list(records[name]) for name in ("sentence1", "sentence2", "label")]
    evaluate = EmbeddingSimilarityEvaluator(*columns, similarity_fn_names=["cosine"], write_csv=False)
    theirs = evaluate(SentenceTransformer(teacher))
    ours = probe(Encoder(teacher, 64).encode, data)["validation"]
    for metric, value in ours.items():
        assert value == pytest.approx(100 * theirs[f"{metric}_cosine"], abs=0.01)


def test_amounts_of_single_texts_come_from_ridge_regression(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 40)):
        records = [{"text": f"a {i:b}", "label": i % 11 / 2} for i in range(first, first + 40)]
        write_split(tmp_path / "mine", f"{split}.jsonl", records)
    data, vectors = read_task(own_task("mine", tmp_path / "mine", Columns()), tmp_path), Vectors()
    found = probe(vectors, data)["test"]
    u = [vectors.column(split, "text") for split in (data.train, data.evaluated["test"])]
    scaler = StandardScaler().fit(u[0])
    learnt = Ridge().fit(scaler.transform(u[0]), data.train["label"][:])
    predicted = learnt.predict(scaler.transform(u[1]))
    assert found["pearson"] == pytest.approx(
        100 * np.corrcoef(predicted, data.evaluated["test"]["label"])[0, 1], rel=1e-4
    )


def test_tasks_without_a_probe_say_why(tmp_path: Path) -> None:
    write_split(tmp_path / "sst2", "validation.jsonl", sentences(4))
    with pytest.raises(UsageError, match="'sst2' has no train split for a linear probe to learn from"):
        probe(Vectors(), read_task(TASKS["sst2"], tmp_path))
    write_split(tmp_path / "sst2", "train.jsonl", sentences(5)[::2])
    write_split(tmp_path / "sst2", "validation.jsonl", sentences(5)[::2])
    with pytest.raises(UsageError, match="all 3 training records of 'sst2' have one class: there is nothing to learn"):
        probe(Vectors(), read_task(TASKS["sst2"], tmp_path))
    words = [{"tokens": ["a"], "label": ["O"]}] * 2
    for split in ("train", "validation"):
        write_split(tmp_path / "ner", f"{split}.jsonl", words)
    reason = why_no_probe(read_task(own_task("ner", tmp_path / "ner", Columns()), tmp_path))
    assert reason == "'ner' predicts tokens, of which a sentence vector says nothing: take --protocol quick"
    assert why_no_probe(pair_task(tmp_path)) is None


def test_a_plain_folder_gives_means_over_the_first_tokens(teacher: str) -> None:
    text = "a b c d e f g h"
    model, tokenizer = AutoModel.from_pretrained(teacher).eval(), tiny_tokenizer()
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=6)
    with torch.no_grad():
        mean = model(**inputs).last_hidden_state.mean(1)[0]
    encoder = Encoder(teacher, max_length=6)
    np.testing.assert_allclose(encoder.encode([text, "a"])[0], mean, rtol=1e-4, atol=1e-5)


def test_the_models_own_files_say_how_without_a_normalisation(tmp_path: Path, teacher: str) -> None:
    plain = SentenceTransformer(teacher)
    normalize = SentenceTransformer(teacher)
    normalize[1].pooling_mode = "cls"
    normalize.append(_normalize())
    normalize.max_seq_length = 5
    normalize.save(str(tmp_path / "sentences"))
    texts = ["a b c d e f g h", "b"]
    encoded = Encoder(str(tmp_path / "sentences"), max_length=20).encode(texts)
    theirs = SentenceTransformer(str(tmp_path / "sentences")).encode(texts)
    norms = np.linalg.norm(encoded, axis=1, keepdims=True)
    assert abs(norms - 1).min() > 0.1
    np.testing.assert_allclose(encoded / norms, theirs, rtol=1e-4, atol=1e-5)  # cls, cut at 5 tokens
    assert not np.allclose(plain.encode(texts), encoded, rtol=0.1)


def _normalize() -> Any:
    from minilm.models.sentence_modules import _TYPES  # where sentence-transformers has it

    module, _, name = _TYPES["Normalize"].rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)()


def test_a_decoder_without_padding_is_padded(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "gpt2", "gpt2")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    encoder = Encoder(str(folder), max_length=20)
    together, alone = encoder.encode(["a b c d e", "b"])[1], encoder.encode(["b"])[0]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
