"""The sentence embedding, with a dense layer and a projection; as a script, one step of it on each of torchrun's ranks.

python -m torch.distributed.run --nproc_per_node=2 embedding_step.py FOLDER BATCH ACCUMULATION
"""

import gc
import json
import sys
from pathlib import Path

import torch
from one_step import LENGTHS, NO_DROPOUT, sequences, trainer
from tiny_models import tiny_model

from minilm.models.sentence_modules import Dense, SentenceHead
from minilm.objectives.embedding import SentenceEmbedding
from minilm.objectives.term import Objective


def objective() -> Objective:
    """From 32 numbers to 24 and back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head, projection = SentenceHead(["mean"], [Dense(32, 24)]), Dense(24, 32, bias=False)
    return Objective([SentenceEmbedding(SentenceHead(["mean"]), head, projection, width=32)])


def one_step(folder: Path, batch: int, accumulation: int) -> None:
    """Twelve sequences in one step, four of them empty; saves the student and what was logged."""
    run = trainer(
        folder,
        teacher=tiny_model("bert", **NO_DROPOUT),
        criterion=objective(),
        train_dataset=sequences((*LENGTHS, 4), empty=4),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=3,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    run.save_model()
    evaluation = run.evaluate(sequences())  # of seven, which two ranks do not share evenly
    if run.args.should_save:
        log = {"embedding": run.state.log_history[0]["embedding"], "eval": evaluation["eval_embedding"]}
        (folder / "log.json").write_text(json.dumps(log))
    run.end()


if __name__ == "__main__":
    one_step(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    gc.collect()  # what still holds gloo's group when the interpreter ends makes it abort
