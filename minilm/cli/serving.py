"""Whether a student is of use before it is fine-tuned."""

import json
from pathlib import Path

from minilm.models.layers import num_layers, resolve_layer
from minilm.models.probes import base_of
from minilm.models.weights import ends_as_teacher
from minilm.objectives.relations import Relations
from minilm.training.runs import METRICS
from minilm.training.trainer import DistillationTrainer


def serves(teacher: str, trainer: DistillationTrainer) -> bool:
    """Whether a student that relations alone have trained is of use as it is; `teacher` is the teacher's name."""
    pairs = [pair for term in trainer.terms if isinstance(term, Relations) for pair in term.layers.items()]
    learns_last = (num_layers(trainer.student), num_layers(trainer.teacher)) in [
        (resolve_layer(trainer.student, layer), resolve_layer(trainer.teacher, of_teacher))
        for layer, of_teacher in pairs
    ]
    return (
        learns_last and _serves_itself(teacher) and ends_as_teacher(base_of(trainer.teacher), base_of(trainer.student))
    )


def _serves_itself(teacher: str) -> bool:
    """False for a student of ours, an assistant for one, that says that it does not."""
    try:
        metrics = json.loads((Path(teacher) / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none there, or another program's
        return True
    return not isinstance(metrics, dict) or metrics.get("serves") is not False
