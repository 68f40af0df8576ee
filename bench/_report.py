"""EXPERIMENTS.md: tables and plots of what was measured, put into a text that is written by hand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _curves import BF16, CurveRow, losses, plot_curves, table_of_curves
from _experiments import COMPARISONS, Cell, Comparison
from _results import ROOT

DOCUMENT = ROOT / "EXPERIMENTS.md"
TASKS = {"stsb": "STS-B", "trec": "TREC", "sst2": "SST-2"}
MEAN = "mean"


@dataclass(kw_only=True)
class ExperimentRow:
    """The value of one task of one cell."""

    system: str
    student: str  # layers x hidden size
    start: str
    text: str  # what it was distilled on
    steps: int
    seed: int
    task: str
    value: float  # of its metric, times 100
    commit: str

    @classmethod
    def of(cls, cell: Cell, text: Path, task: str, value: float, commit: str) -> "ExperimentRow":
        """`text` is told by the file's name and its folder's."""
        told = f"{text.resolve().parent.name}/{text.name}"
        return cls(
            system=cell.system,
            student=cell.student,
            start=cell.start,
            text=told,
            steps=cell.steps,
            seed=cell.seed,
            task=task,
            value=value,
            commit=commit,
        )

    @property
    def cell(self) -> Cell:
        return Cell(self.system, self.student, self.start, self.steps, self.seed)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.cell, self.text, self.task)


Line = tuple[str, str, str, int]  # system, student, start, steps
Values = dict[Line, dict[str, list[float]]]  # by task and for their mean: a number a seed


def values_by_line(rows: Sequence[ExperimentRow]) -> Values:
    """In the order of the seeds; a cell without one of the tasks is left out."""
    cells: dict[Cell, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        cells.setdefault(row.cell, {})[row.task] = row.value
    values: Values = {}
    for cell, found in cells.items():
        if found.keys() >= TASKS.keys():
            line = values.setdefault((cell.system, cell.student, cell.start, cell.steps), {})
            for task in TASKS:
                line.setdefault(task, []).append(found[task])
            line.setdefault(MEAN, []).append(mean(found[task] for task in TASKS))
    return values


def table(comparison: Comparison, values: Values) -> str:
    """Markdown: each line's mean over its seeds, ± their standard deviation where there are several."""
    heads = ["system", "student", "start", "steps", *TASKS.values(), MEAN, "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---:|" + "---:|" * (len(TASKS) + 2)]
    for line in comparison.lines:
        if found := values.get(line):
            system, student, start, steps = line
            told = [_with_spread(found[task]) for task in (*TASKS, MEAN)]
            lines.append(f"| {' | '.join([system, student, start, f'{steps:,}', *told, str(len(found[MEAN]))])} |")
    return "\n".join(lines)


def _with_spread(numbers: list[float]) -> str:
    return f"{mean(numbers):.1f}" + (f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else "")


def write_report(rows: Sequence[ExperimentRow], drawn: Sequence[CurveRow], document: Path, folder: Path) -> None:
    """Replaces what stands between the markers of each comparison, and draws its plot into the folder."""
    values, found, text = values_by_line(rows), losses(drawn), document.read_text(encoding="utf-8")
    tables = {name: table(comparison, values) for name, comparison in COMPARISONS.items()}
    for name, written in (tables | {"curves": table_of_curves(found)}).items():
        text = _put(text, name, written)
    document.write_text(text, encoding="utf-8")
    if found[BF16]:
        plot_curves(found, folder / "experiments_curves.png")
    for name, comparison in COMPARISONS.items():
        if measured := list(_measured(comparison, values)):
            _plot(comparison.title, measured, folder / f"experiments_{name}.png")


def _put(text: str, name: str, written: str) -> str:
    """The text with that between the markers of this name. Raises `ValueError` where they are not there."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"the document has no {start.strip()} with {end} behind it")
    return f"{before}{start}{written}\n{end}{after}"


def _measured(comparison: Comparison, values: Values) -> Iterator[tuple[str, list[float]]]:
    """Each line's name, without what all have in common, and the mean of its tasks by seed."""
    found = [line for line in comparison.lines if line in values]
    varied = [index for index in range(4) if len({line[index] for line in found if line[3]}) > 1]
    for line in found:
        words = [line[0], *(str(line[index]) for index in (1, 2, 3) if index in varied and line[index])]
        words += [line[2]] if 2 not in varied and not line[3] and line[2] else []
        yield ", ".join(words), values[line][MEAN]


def _plot(title: str, measured: list[tuple[str, list[float]]], path: Path) -> None:
    """A dot a seed and a bar at their mean, the best at the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = sorted(measured, key=lambda line: mean(line[1]))
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + 0.27 * len(measured)), layout="constrained")
    for place, (_, numbers) in enumerate(measured):
        axis.plot([mean(numbers)], [place], "|", color="#D55E00", markersize=13, markeredgewidth=2)
        axis.plot(numbers, [place] * len(numbers), "o", color="#0072B2", markersize=4)
    axis.set_yticks(range(len(measured)), [name for name, _ in measured], fontsize=8)
    axis.set_xlabel(f"mean of {', '.join(TASKS.values())}; a dot is a seed")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
