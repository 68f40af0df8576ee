"""What `minilm-eval` writes: eval.json with everything, eval.md with the table and what it says, eval.png."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilm.escapes import markdown
from minilm.evaluation.judged import BATCH, device_name, fingerprint_model
from minilm.evaluation.mteb_tasks import MtebTask
from minilm.evaluation.plot import plot_quality
from minilm.evaluation.results import Results
from minilm.evaluation.table import Judged, all_scores, markdown_table, results_table
from minilm.evaluation.task_data import TaskData

JSON, MARKDOWN, PLOT = "eval.json", "eval.md", "eval.png"
PACKAGES = ("torch", "transformers", "datasets", "sentence-transformers", "scikit-learn", "scipy")
_ASKS = {
    "sst2": "whether a film review is positive",
    "mnli": "whether a second sentence follows from the first, contradicts it or neither",
    "qnli": "whether a sentence holds the answer to a question",
    "qqp": "whether two questions ask the same",
    "cola": "whether a sentence is good English",
    "rte": "whether a second sentence follows from the first",
    "mrpc": "whether two sentences say the same",
    "stsb": "how alike in meaning two sentences are",
    "wnli": "whether a sentence with a pronoun resolved follows from the first",
    "trec": "what kind of thing a question asks for",
    "squad": "which words of a text answer a question",
    "squad_v2": "which words of a text answer a question, if any do",
}
_METRICS = {
    "accuracy": "the share of right answers",
    "f1": "F1, the mean of precision and recall",
    "macro_f1": "the mean of the classes' F1",
    "matthews": "Matthews' correlation, 0 for guessing",
    "spearman": "Spearman's rank correlation",
    "pearson": "Pearson's correlation",
    "entity_f1": "F1 of whole entities",
    "exact": "the share of exact answers",
}


def publish_evaluation(
    output: Path,
    protocol: str,
    models: Sequence[Judged],
    folders: Mapping[str, str],
    tasks: Sequence[TaskData],
    of_mteb: Sequence[MtebTask],
    left_out: Mapping[str, str],
    results: Results,
) -> str:
    """Writes the three files, in place of those of an earlier evaluation, and returns the table for the terminal.

    Args:
        folders: what loads each model.
        left_out: why the other tasks of the folder were not evaluated.
    """
    everything = {
        "protocol": protocol,
        "settings": results.settings,
        "versions": {package: version(package) for package in PACKAGES},
        "device": device_name(),
        "tasks": {
            **{data.task.name: _of_task(data, results) for data in tasks},
            **{task.name: task.identity for task in of_mteb},
        },
        "left_out": dict(left_out),
        "models": {model.name: _of_model(model, folders[model.name], models[0], results) for model in models},
    }
    table = results_table(models)
    report = _report(protocol, models, tasks, of_mteb, left_out, results, table)
    _write(output / JSON, lambda part: part.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8"))
    _write(output / MARKDOWN, lambda part: part.write_text("\n".join(report), encoding="utf-8"))
    figure = plot_quality(models, f"forward only on {device_name()}")
    _write(output / PLOT, lambda part: figure.savefig(part, format="png", dpi=120))
    return "\n".join([*table, "", f"{output / MARKDOWN} says what the numbers are; {output / PLOT} shows them."])


def _of_task(data: TaskData, results: Results) -> dict[str, Any]:
    return {
        **asdict(data.task),
        "train_records": results.train_records[data.task.name],
        "scored_records": {split: len(records) for split, records in data.evaluated.items()},
        "classes": data.classes,
        "fingerprint": data.fingerprint,
    }


def _of_model(model: Judged, folder: str, first: Judged, results: Results) -> dict[str, Any]:
    return {
        "loaded_from": folder,
        "fingerprint": fingerprint_model(folder),
        "parameters": model.parameters,
        "texts_per_second": model.texts_per_second,
        "speed_up": model.texts_per_second / first.texts_per_second,
        "scores": model.scores,
        "average": model.average(),
        "chosen": results.chosen.get(model.name, {}),
    }


def _report(
    protocol: str,
    models: Sequence[Judged],
    tasks: Sequence[TaskData],
    of_mteb: Sequence[MtebTask],
    left_out: Mapping[str, str],
    results: Results,
    table: list[str],
) -> list[str]:
    timed_on = "texts of these tasks" if tasks else "docstrings of Python's standard library"
    return [
        f"# Evaluation by the protocol {protocol}",
        "",
        *table,
        "",
        f"![quality over speed]({PLOT})",
        "",
        "What the columns are:",
        "",
        "- embedding, Transformer: how many parameters are tables of tokens and positions, and how many compute.",
        f"- speed-up: how many times as many texts a second as {markdown(models[0].name)}, the first model, which "
        f"reads {models[0].texts_per_second:,.0f}. It is measured forward only, in batches of {BATCH}, on {timed_on}, "
        f"on {device_name()}, the models in turns.",
        *(f"- {markdown(data.task.name)}: {_what_is_scored(data, results)}" for data in tasks),
        *(f"- {task.name}: as mteb {task.identity['mteb']} learns and scores it." for task in of_mteb),
        "- average: the mean of the tasks' columns.",
        "",
        "All scores are times 100: higher is better, and 100 is the most.",
        "",
        f"How they were made: {results.how}",
        "",
        *all_scores(models),
        "",
        *(_chosen(models, results) if results.chosen else []),
        *(f"Left out {markdown(name)}: {markdown(reason)}\n" for name, reason in left_out.items()),
    ]


def _what_is_scored(data: TaskData, results: Results) -> str:
    task = data.task
    split, records = next(iter(data.evaluated.items()))
    asks = f"{_ASKS[task.name]}; " if task.name in _ASKS else ""
    metric = _METRICS.get(task.metrics[0], task.metrics[0])
    classes = f" of {len(data.classes)} classes" if data.classes else ""
    learnt = results.train_records[task.name]
    return f"{asks}{metric}, on {len(records):,} records of {split}{classes}; {learnt:,} records of train."


def _chosen(models: Sequence[Judged], results: Results) -> list[str]:
    """A table of the learning rates and epochs."""
    rows = [
        [task, *(f"{of[task]['learning_rate']:g}, {of[task]['epochs']} epochs" for of in results.chosen.values())]
        for task in models[0].scores
    ]
    return [*markdown_table(["learning rate and epochs", *(model.name for model in models)], rows), ""]


def _write(path: Path, write: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)
