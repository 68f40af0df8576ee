"""What was found to help students like the one that is about to be trained, where the run does without it."""

from collections.abc import Callable
from typing import Any

Metrics = dict[str, Any]  # as `minilm.cli.distill` gathers them before training


def hints(metrics: Metrics) -> list[str]:
    """A line a rule; none in a chain of runs, which is such help itself."""
    if metrics["in_chain"]:
        return []
    return [hint for rule in RULES if (hint := rule(metrics))]


def _assistant(metrics: Metrics) -> str | None:
    """The paper's own rule."""
    teacher, student = metrics["teacher"], metrics["student"]
    if 2 * student["layers"] > teacher["layers"] or 2 * student["hidden_size"] > teacher["hidden_size"]:
        return None
    return (
        f"at most half the teacher's layers and width: an assistant may help, --assistant_num_layers "
        f"{teacher['layers']} --assistant_hidden_size {student['hidden_size']} (MiniLM, section 3.4)"
    )


def _untrained_end(metrics: Metrics) -> str | None:
    """EXPERIMENTS.md, the student of half the width."""
    if metrics["serves"] or metrics["learns_hidden"] or metrics["processor"] != "tokenizer":
        return None
    arguments, narrower = metrics["arguments"], metrics["student"]["hidden_size"] < metrics["teacher"]["hidden_size"]
    pca = narrower and arguments["student"] is None and arguments["student_init"] != "pca"
    return (
        "relations leave what lies above them as it starts: for sentence vectors that serve without fine-tuning, "
        f"--embedding_weight 1{' --student_init pca' if pca else ''} (EXPERIMENTS.md)"
    )


RULES: tuple[Callable[[Metrics], str | None], ...] = (_assistant, _untrained_end)
