"""One step of TinyBERT's Transformer distillation."""

from pathlib import Path

import torch
from one_step import NO_DROPOUT, WITH_PARAMETERS, take_step
from tiny_models import tiny_model

from minilm.models.students import build_student
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import Objective


def one_step(folder: Path, batch: int, accumulation: int) -> None:
    teacher = tiny_model("bert", **NO_DROPOUT)
    torch.manual_seed(0)  # of the projection
    terms = SYSTEMS["tinybert"].terms(teacher, build_student(teacher, num_layers=2))
    take_step(folder, batch, accumulation, criterion=Objective(terms), **WITH_PARAMETERS).end()
