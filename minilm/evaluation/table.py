"""The papers' table of results: models down, tasks across."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from minilm.escapes import markdown
from minilm.evaluation.tasks import Scores


@dataclass(frozen=True)
class Judged:
    """What is known of a model.

    Attributes:
        name: in the table.
        parameters: {"embedding", "transformer", "total"}.
        texts_per_second: forward only.
        scores: of each task, by its name.
    """

    name: str
    parameters: dict[str, int]
    texts_per_second: float
    scores: dict[str, Scores]

    def main_scores(self) -> list[float]:
        """Of each task the first metric on the first split."""
        return [next(iter(next(iter(scores.values())).values())) for scores in self.scores.values()]

    def average(self) -> float:
        """Of the main scores."""
        return fmean(self.main_scores())


def results_table(models: Sequence[Judged]) -> list[str]:
    """Lines of Markdown, aligned; the speed-up is over the first model."""
    first = models[0]
    header = ["model", "embedding", "Transformer", "speed-up", *map(_column, first.scores.items()), "average"]
    rows = [
        [
            model.name,
            _millions(model.parameters["embedding"]),
            _millions(model.parameters["transformer"]),
            f"{model.texts_per_second / first.texts_per_second:.1f}x",
            *(f"{score:.1f}" for score in model.main_scores()),
            f"{model.average():.1f}",
        ]
        for model in models
    ]
    return markdown_table(header, rows)


def all_scores(models: Sequence[Judged]) -> list[str]:
    """Lines of Markdown: every metric on every split."""
    rows = [
        [f"{task}, {split}, {metric}", *(f"{model.scores[task][split][metric]:.1f}" for model in models)]
        for task, scores in models[0].scores.items()
        for split, metrics in scores.items()
        for metric in metrics
    ]
    return markdown_table(["task, split, metric", *(model.name for model in models)], rows)


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns, so that it reads well on a terminal too.

    Args:
        header, rows: texts as they are to be seen, escaped here.
    """
    header, rows = [*map(markdown, header)], [[*map(markdown, row)] for row in rows]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [f"{cells[0]:<{widths[0]}}"]
        aligned += [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(aligned)} |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(header), rule, *(line(row) for row in rows)]


def _column(task: tuple[str, Scores]) -> str:
    name, scores = task
    return f"{name} {next(iter(next(iter(scores.values()))))}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"
