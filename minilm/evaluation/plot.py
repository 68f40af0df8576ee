"""Quality over speed, a point for each model."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from minilm.escapes import plot_label
from minilm.evaluation.table import Judged

_MARKERS = "osD^vPX*<>"


def plot_quality(models: Sequence[Judged], speed_of: str) -> Figure:
    """The average score over the texts a second. Models are told by a legend, so that no label lies upon another.

    Args:
        speed_of: what the speed was measured on.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate(models):
        axes.plot(
            model.texts_per_second,
            model.average(),
            _MARKERS[index % len(_MARKERS)],
            color=f"C{index % 10}",
            markersize=9,
            label=f"{plot_label(model.name)} ({model.parameters['total'] / 1e6:.1f}M)",
        )
    axes.margins(0.15)
    axes.set_xlim(left=0)
    tasks = list(models[0].scores)
    of_tasks = plot_label(", ".join(tasks)) if len(tasks) <= 4 else f"{len(tasks)} tasks"
    axes.set(xlabel=f"texts a second, {speed_of}", ylabel=f"average score: {of_tasks}", title="Quality over speed")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure
