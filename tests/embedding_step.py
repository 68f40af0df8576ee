"""The sentence embedding, with a dense layer and a projection, and one step of it."""

from pathlib import Path

import torch
from one_step import WITH_PARAMETERS, take_step

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
    take_step(folder, batch, accumulation, criterion=objective(), **WITH_PARAMETERS).end()
