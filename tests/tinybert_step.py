"""One step of TinyBERT's Transformer distillation; as a script, on each rank that torchrun starts.

python -m torch.distributed.run --nproc_per_node=2 tinybert_step.py FOLDER BATCH ACCUMULATION
"""

from pathlib import Path

import torch
from one_step import NO_DROPOUT, WITH_PARAMETERS, as_script, take_step
from tiny_models import tiny_model

from minilm.models.students import build_student
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import Objective


def one_step(folder: Path, batch: int, accumulation: int) -> None:
    teacher = tiny_model("bert", **NO_DROPOUT)
    torch.manual_seed(0)  # of the projection
    terms = SYSTEMS["tinybert"].terms(teacher, build_student(teacher, num_layers=2))
    take_step(folder, batch, accumulation, criterion=Objective(terms), **WITH_PARAMETERS).end()


if __name__ == "__main__":
    as_script(one_step)
