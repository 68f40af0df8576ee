"""Time and peak memory over the length, all providers, one panel a case."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _results import LossRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour a provider in every panel and file (Okabe and Ito: told apart by colour-blind readers too).
STYLES = {
    "fused": ("#0072B2", "o", 2.5),
    "eager": ("#D55E00", "s", 1.5),
    "eager-fp32": ("#E69F00", "v", 1.5),
    "compile": ("#009E73", "D", 1.5),
    "flash": ("#CC79A7", "^", 1.5),
    "flex": ("#56B4E9", "<", 1.5),
    "liger": ("#000000", "+", 1.5),
    "loop": ("#777777", "x", 1.5),
}
COLUMNS = 3


def plot(rows: Sequence[LossRow], path: Path) -> list[Path]:
    """Writes <path>_time.png and <path>_memory.png of forward + backward, all rows from one device.

    A panel is a case with the same number of tokens in the batch at every length, of which it needs two.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[object, ...], list[LossRow]] = {}
    for row in sorted(rows, key=lambda row: row.N):
        if row.mode == "both" and row.ms_p50 is not None:
            panels.setdefault((row.case, row.heads, row.dtype, row.B * row.N), []).append(row)
    panels = {key: chosen for key, chosen in panels.items() if len({row.N for row in chosen}) > 1}
    if not panels:
        return []
    written = []
    for column, label in (("ms_p50", "milliseconds"), ("peak_mib", "MiB above the inputs")):
        columns = min(COLUMNS, len(panels))
        lines = -(-len(panels) // columns)
        size = (3.2 * columns + 1.4, 3 * lines + 0.5)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
        for axis, chosen in zip(axes.flat, panels.values(), strict=False):
            _panel(axis, chosen, column)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel(label)
        handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
        figure.suptitle(f"Forward + backward of the loss, {rows[0].gpu}", fontsize=10)
        figure.set_layout_engine("constrained")
        out = path.with_name(f"{path.name}_{'time' if column == 'ms_p50' else 'memory'}.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
        plt.close(figure)
        written.append(out)
    return written


def _panel(axis: "Axes", rows: Sequence[LossRow], column: str) -> None:
    some = rows[0]
    for provider, (colour, marker, width) in STYLES.items():
        points = {row.N: getattr(row, column) for row in rows if row.provider == provider}
        if points:
            axis.plot(list(points), list(points.values()), color=colour, marker=marker, linewidth=width, label=provider)
    floor = {row.N: row.floor_ms for row in rows if row.floor_ms}
    if column == "ms_p50" and floor:
        axis.plot(list(floor), list(floor.values()), color="black", linestyle="--", linewidth=1, label="floor")
    lengths = sorted({row.N for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(n) for n in lengths])
    sizes = f"{some.heads} heads, d {some.d_t}/{some.d_s}, {some.dtype}"
    axis.set_title(f"{some.case}: {some.relations}\n{sizes}", fontsize=9)
    axis.set_xlabel("tokens N")
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
