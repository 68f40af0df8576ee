"""What frozen sentence vectors are worth on a task: the model is not trained, a linear model at most is.

    classification   scikit-learn's logistic regression (L2 penalty, C = 1) on standardised features
    regression       of pairs the cosine of the two vectors, of which nothing is learnt; of single texts scikit-learn's
                     ridge regression (alpha = 1) on standardised features

The features of a text are its vector u, those of a pair u, v, |u - v| and u * v.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from datasets.utils import tqdm
from numpy.typing import NDArray
from sentence_transformers.util import pairwise_cos_sim
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from minilm.errors import UsageError
from minilm.evaluation.cells import Cells
from minilm.evaluation.encoders import Encoder
from minilm.evaluation.judged import fingerprint_model
from minilm.evaluation.metrics import scores
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.tasks import Scores, Task

# Until the optimum: with scikit-learn's own tolerance rounding decides where it stops, and moves TREC by 0.4 points.
TOLERANCE, MAX_ITER = 1e-6, 5000
COMPUTED_BY = ("torch", "transformers", "sentence-transformers", "scikit-learn")
Vectors = NDArray[np.float32]
Encode = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True)
class ProbeSettings:
    """How the vectors are made and what is learnt from.

    Attributes:
        max_length: tokens of a text, special ones among them.
        max_train_records: of a training split; the rest is not read.
        seed: of which these are.
    """

    max_length: int = 128
    max_train_records: int = 10_000
    seed: int = 0


def describe(settings: ProbeSettings) -> str:
    """What is done, in sentences for the reader of a table."""
    return (
        "No model is trained. sentence-transformers makes one vector of each text, as the model's own files say or by "
        "the mean over its tokens, before a normalisation. Classes are predicted by scikit-learn's logistic regression "
        "(C = 1) on standardised features: the vector u, of a pair u, v, |u - v| and u * v. Amounts of pairs are the "
        "cosine of u and v, of which nothing is learnt; those of single texts come from ridge regression (alpha = 1). "
        f"Texts are cut at {settings.max_length} tokens, training splits at {settings.max_train_records:,} records, "
        f"drawn with seed {settings.seed}. Nothing was selected: there is one setting."
    )


class Probe(NamedTuple):
    """A task as it is done: its name, all that tells it from another, JSON-able, and how a model is scored."""

    name: str
    identity: Any
    scores: Callable[[Encoder], Scores]


def probe_of(data: TaskData, settings: ProbeSettings) -> Probe:
    """The task by `probe`, with as many training records as the settings say."""
    limited = data.with_train_records(settings.max_train_records, settings.seed)
    return Probe(data.task.name, limited.fingerprint, lambda encoder: probe(encoder.encode, limited))


def probe_all(
    models: Mapping[str, str], tasks: Sequence[Probe], settings: ProbeSettings, cells: Cells
) -> dict[str, dict[str, Scores]]:
    """{model: {task: scores}}, those that are in `cells` from there; a model is loaded where one is missing.

    Args:
        models: what each is called, and the folder or name that loads it.
    """
    found: dict[str, dict[str, Scores]] = {label: {} for label in models}
    with tqdm(total=len(models) * len(tasks), unit=" results") as bar:
        for label, name in models.items():
            encoder = None
            by_all = {
                "protocol": "probe",
                "max_length": settings.max_length,
                "model": fingerprint_model(name),
                "versions": {package: version(package) for package in COMPUTED_BY},
            }
            for task in tasks:
                bar.set_description(f"{label}, {task.name}")
                key = {**by_all, "task": task.name, "data": task.identity}
                if (result := cells.get(key)) is None:
                    start = time.monotonic()
                    encoder = encoder or Encoder(name, settings.max_length)
                    result = {"scores": task.scores(encoder), "seconds": time.monotonic() - start}
                    cells.put(key, {"model": label, **result})
                found[label][task.name] = result["scores"]
                bar.update()
    return found


def why_no_probe(data: TaskData) -> str | None:
    """Why frozen vectors cannot be judged on a task; None where they can."""
    task = data.task
    if task.form in ("tokens", "answers"):
        return f"{task.name!r} predicts {task.form}, of which a sentence vector says nothing: take --protocol quick"
    if not len(data.train) and not is_by_cosine(task):
        return f"{task.name!r} has no train split for a linear probe to learn from"
    return None


def probe(encode: Encode, data: TaskData) -> dict[str, dict[str, float]]:
    """The scores by split; each distinct text is encoded once.

    Args:
        encode: makes vectors (texts, E) of texts, as `Encoder.encode`.

    Raises:
        UsageError: a task that has no probe, or nothing to learn it from.
    """
    if reason := why_no_probe(data):
        raise UsageError(reason)
    task = data.task
    if task.form == "classification" and len(set(data.train[task.label])) < 2:
        raise UsageError(
            f"all {len(data.train):,} training records of {task.name!r} have one class: there is nothing to learn"
        )
    splits = dict(data.evaluated) if is_by_cosine(task) else {"train": data.train, **data.evaluated}
    place = {text: index for index, text in enumerate(_distinct(task, splits.values()))}
    vectors = encode(list(place))

    def of(split: str, column: str) -> Vectors:
        return vectors[[place[text] for text in splits[split][column]]]

    if is_by_cosine(task):
        found = {split: pairwise_cos_sim(*(of(split, column) for column in task.texts)).numpy() for split in splits}
    else:
        features = {split: _features([of(split, column) for column in task.texts]) for split in splits}
        learner = LogisticRegression(tol=TOLERANCE, max_iter=MAX_ITER) if task.form == "classification" else Ridge()
        learnt = make_pipeline(StandardScaler(), learner).fit(features["train"], _labels(task, data.train))
        found = {split: learnt.predict(features[split]) for split in data.evaluated}
    return {
        split: scores(task.metrics, found[split], _labels(task, records)) for split, records in data.evaluated.items()
    }


def is_by_cosine(task: Task) -> bool:
    """Whether nothing is learnt for a task."""
    return task.form == "regression" and len(task.texts) == 2


def _distinct(task: Task, splits: Any) -> dict[str, None]:
    return dict.fromkeys(text for split in splits for column in task.texts for text in split[column])


def _features(vectors: list[Vectors]) -> NDArray[np.float64]:
    if len(vectors) == 1:
        return vectors[0].astype(np.float64)
    u, v = vectors  # float32: what is below its range stays a constant, not a feature that is scaled up
    return np.concatenate([u, v, np.abs(u - v), u * v], axis=1).astype(np.float64)


def _labels(task: Task, split: Dataset) -> NDArray[Any]:
    return np.asarray(split[task.label][:])
