"""A term of the tests' own, one step of it, and a resume from there."""

from pathlib import Path

import torch
from one_step import WITH_PARAMETERS, take_step
from torch import Tensor, nn

from minilm import MiniLMLoss
from minilm.models.batches import Batch, token_mask
from minilm.models.observe import Needs, Observed
from minilm.objectives.relations import Relations
from minilm.objectives.term import Objective, Term


class HiddenMSE(Term):
    """The student's first layer, projected, learns the teacher's second."""

    unit, teacher, student = "tokens", Needs(hidden=(2,)), Needs(hidden=(1,))

    def __init__(self) -> None:
        super().__init__()
        self.parts = {"hidden_1": 0.5}
        self.projection = nn.Linear(32, 32, bias=False)
        nn.init.eye_(self.projection.weight)

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = (self.projection(student.hidden[1]) - teacher.hidden[2]).square().mean(-1)
        mask = token_mask(batch)
        rows = rows if mask is None else rows[mask.bool()]
        mean = rows.sum() / max(1, rows.numel())
        return 0.5 * mean, {"hidden_1": mean.detach()}


def objective() -> Objective:
    return Objective([Relations(MiniLMLoss()), HiddenMSE()])


def one_step(folder: Path, batch: int, accumulation: int) -> None:
    """One step, and a resume from its checkpoint."""
    run = take_step(folder, batch, accumulation, criterion=objective(), **WITH_PARAMETERS)
    trained = run.terms[1].projection.weight
    saved = trained.detach().clone()
    with torch.no_grad():
        trained.zero_()
    run.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert torch.equal(run.terms[1].projection.weight, saved)
    assert not torch.equal(saved, torch.eye(32))
    run.end()
