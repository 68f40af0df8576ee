"""The loss by step of the same run in bf16, in fp32 and by the reference: rows, their table, their plot."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from _experiments import LAYERS, WHOLE, Cell

BF16, FP32, REFERENCE = "minilm", "minilm, fp32", "minilm, fp32, reference"
NAMES = {BF16: "fused, bf16", FP32: "fused, fp32", REFERENCE: "reference, fp32"}
STEPS = 300


@dataclass(kw_only=True)
class CurveRow:
    """What the Trainer logged of one run at one step: the mean of the loss since the step logged before."""

    system: str
    student: str  # layers x hidden size
    start: str
    steps: int
    seed: int
    step: int
    loss: float  # nats
    commit: str

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.system, self.student, self.start, self.steps, self.seed, self.step)


def curves(commits: dict[Cell, str], work: Path) -> Iterator[CurveRow]:
    """Of the runs of these cells that are compared and left a log in their last checkpoint.

    Args:
        commits: of each cell the one that made it.
    """
    for cell, commit in commits.items():
        state = work / cell.name / f"checkpoint-{cell.steps}" / "trainer_state.json"
        if cell.system in NAMES and (cell.student, cell.start, cell.steps) == (WHOLE, LAYERS, STEPS) and state.exists():
            for entry in json.loads(state.read_text())["log_history"]:
                if "loss" in entry:
                    yield CurveRow(**asdict(cell), step=entry["step"], loss=entry["loss"], commit=commit)


Losses = dict[str, dict[int, dict[int, float]]]  # by system, seed and step


def losses(rows: Iterable[CurveRow]) -> Losses:
    """Of each system only the seeds that all three have."""
    found: Losses = {name: {} for name in NAMES}
    for row in rows:
        found[row.system].setdefault(row.seed, {})[row.step] = row.loss
    common = set.intersection(*({*of_seeds} for of_seeds in found.values()))
    return {name: {seed: found[name][seed] for seed in sorted(common)} for name in NAMES}


def table_of_curves(found: Losses) -> str:
    """Markdown: the means over the seeds by step, and how far two curves are apart in the seed where it is most."""
    heads = ["step", *NAMES.values(), "fused from reference, fp32", "bf16 from fp32, fused", "seeds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---:|' * len(heads)}"]
    for step in _steps(found):
        means = [f"{mean(of_steps[step] for of_steps in found[name].values()):.5f}" for name in NAMES]
        apart = [f"{100 * apart_at(found, *pair, step):.2g} %" for pair in ((FP32, REFERENCE), (BF16, FP32))]
        lines.append(f"| {' | '.join([str(step), *means, *apart, str(len(found[BF16]))])} |")
    return "\n".join(lines)


def apart_at(found: Losses, system: str, other: str, step: int) -> float:
    """The largest relative difference of two systems' losses at a step over the seeds."""
    pairs = [(found[system][seed][step], found[other][seed][step]) for seed in found[other]]
    return max(abs(mine / theirs - 1) for mine, theirs in pairs)


def _steps(found: Losses) -> Sequence[int]:
    return sorted({step for seeds in found.values() for steps in seeds.values() for step in steps})


def plot_curves(found: Losses, path: Path) -> None:
    """The curves of every seed above, how far two are apart below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, figsize=(7.5, 5), height_ratios=(2, 1), sharex=True, layout="constrained")
    looks = {BF16: ("#0072B2", "-"), FP32: ("#D55E00", "--"), REFERENCE: ("#000000", ":")}
    steps = _steps(found)
    for name, (colour, dashes) in looks.items():
        for index, of_steps in enumerate(found[name].values()):
            label = NAMES[name] if not index else None
            above.plot(steps, [of_steps[step] for step in steps], dashes, color=colour, label=label)
    for pair, colour in (((FP32, REFERENCE), "#D55E00"), ((BF16, FP32), "#0072B2")):
        label = f"{NAMES[pair[0]]} from {NAMES[pair[1]]}"
        below.plot(steps, [100 * apart_at(found, *pair, step) for step in steps], "o-", color=colour, label=label)
    above.set_ylabel("loss in nats, mean of 50 steps")
    below.set_ylabel("apart, %")
    below.set_yscale("symlog", linthresh=1e-5)  # 0 too
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    for axis in (above, below):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    above.set_title(f"One run, three ways to compute its loss; {len(found[BF16])} seeds", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
