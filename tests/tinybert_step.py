"""One step of TinyBERT's Transformer distillation; as a script, on each rank that torchrun starts.

python -m torch.distributed.run --nproc_per_node=2 tinybert_step.py FOLDER BATCH ACCUMULATION
"""

import gc
import json
import sys
from pathlib import Path

import torch
from one_step import LENGTHS, NO_DROPOUT, sequences, trainer
from tiny_models import tiny_model

from minilm.models.students import build_student
from minilm.objectives.systems import SYSTEMS
from minilm.objectives.term import Objective


def one_step(folder: Path, batch: int, accumulation: int) -> None:
    """Twelve sequences in one step, four of them empty; saves the student and what was logged."""
    teacher = tiny_model("bert", **NO_DROPOUT)
    torch.manual_seed(0)  # of the projection
    terms = SYSTEMS["tinybert"].terms(teacher, build_student(teacher, num_layers=2))
    run = trainer(
        folder,
        teacher=teacher,
        criterion=Objective(terms),
        train_dataset=sequences((*LENGTHS, 4), empty=4),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    run.save_model()
    if run.args.should_save:
        logged = {name: run.state.log_history[0][name] for name in ("loss", *run.parts)}
        (folder / "log.json").write_text(json.dumps(logged))
    run.end()


if __name__ == "__main__":
    one_step(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    gc.collect()  # what still holds gloo's group when the interpreter ends makes it abort
