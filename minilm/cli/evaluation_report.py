"""What `minilm-eval` writes: eval.json with everything, eval.md with the table and what it says, eval.png."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilm.evaluation.judged import BATCH, device_name, fingerprint_model
from minilm.evaluation.plot import plot_quality
from minilm.evaluation.probes import ProbeSettings
from minilm.evaluation.table import Judged, all_scores, results_table
from minilm.evaluation.task_data import TaskData

JSON, MARKDOWN, PLOT = "eval.json", "eval.md", "eval.png"
PACKAGES = ("torch", "transformers", "datasets", "sentence-transformers", "scikit-learn", "scipy")


def publish_evaluation(
    output: Path,
    models: Sequence[Judged],
    folders: Mapping[str, str],
    tasks: Sequence[TaskData],
    left_out: Mapping[str, str],
    settings: ProbeSettings,
) -> str:
    """Writes the three files, in place of those of an earlier evaluation, and returns the table for the terminal.

    Args:
        folders: what loads each model.
        left_out: why the other tasks of the folder were not evaluated.
    """
    everything = {
        "protocol": "probe",
        "settings": asdict(settings),
        "versions": {package: version(package) for package in PACKAGES},
        "device": device_name(),
        "tasks": {data.task.name: _of_task(data) for data in tasks},
        "left_out": dict(left_out),
        "models": {model.name: _of_model(model, folders[model.name], models[0]) for model in models},
    }
    table = results_table(models)
    _replace(output / JSON, json.dumps(everything, indent=2) + "\n")
    _replace(output / MARKDOWN, "\n".join(_report(models, tasks, left_out, settings, table)))
    figure = plot_quality(models, f"forward only on {device_name()}")
    part = output / f"{PLOT}.part"
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, output / PLOT)
    return "\n".join([*table, "", f"{output / MARKDOWN} says what the numbers are; {output / PLOT} shows them."])


def _of_task(data: TaskData) -> dict[str, Any]:
    return {
        **asdict(data.task),
        "train_records": len(data.train),
        "scored_records": {split: len(records) for split, records in data.evaluated.items()},
        "classes": data.classes,
        "fingerprint": data.fingerprint,
    }


def _of_model(model: Judged, folder: str, first: Judged) -> dict[str, Any]:
    return {
        "loaded_from": folder,
        "fingerprint": fingerprint_model(folder),
        "parameters": model.parameters,
        "texts_per_second": model.texts_per_second,
        "speed_up": model.texts_per_second / first.texts_per_second,
        "scores": model.scores,
        "average": model.average(),
    }


def _report(
    models: Sequence[Judged],
    tasks: Sequence[TaskData],
    left_out: Mapping[str, str],
    settings: ProbeSettings,
    table: list[str],
) -> list[str]:
    return [
        "# Evaluation on frozen sentence vectors",
        "",
        *table,
        "",
        f"![quality over speed]({PLOT})",
        "",
        "What the columns are:",
        "",
        "- embedding, Transformer: how many parameters are tables of tokens and positions, and how many compute.",
        f"- speed-up: how many more texts a second than {models[0].name}, the first model, which reads "
        f"{models[0].texts_per_second:,.0f}. It is measured forward only, in batches of {BATCH}, on texts of these "
        f"tasks, on {device_name()}, the models in turns.",
        *(f"- {data.task.name}: {_what_is_scored(data)}" for data in tasks),
        "- average: the mean of the tasks' columns.",
        "",
        "All scores are times 100: higher is better, and 100 is the most.",
        "",
        "How they were made: no model is trained. sentence-transformers makes one vector of each text, as the model's "
        "own files say or by the mean over its tokens, before a normalisation. Classes are predicted by scikit-learn's "
        "logistic regression (C = 1) on standardised features: the vector u, of a pair u, v, |u - v| and u * v. "
        "Amounts of pairs are the cosine of u and v, those of single texts come from ridge regression (alpha = 1). "
        f"Texts are cut at {settings.max_length} tokens, training splits at {settings.max_train_records:,} records, "
        f"drawn with seed {settings.seed}. Nothing was selected: there is one setting.",
        "",
        *all_scores(models),
        "",
        *(f"Left out {name}: {reason}\n" for name, reason in left_out.items()),
    ]


def _what_is_scored(data: TaskData) -> str:
    split, records = next(iter(data.evaluated.items()))
    if data.task.form == "regression" and len(data.task.texts) == 2:
        learnt = "nothing is learnt"
    else:
        learnt = f"learnt from {len(data.train):,} of train"
    classes = f", {len(data.classes)} classes" if data.classes else ""
    return f"{data.task.metrics[0]} on {len(records):,} records of {split}{classes}; {learnt}."


def _replace(path: Path, content: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)
