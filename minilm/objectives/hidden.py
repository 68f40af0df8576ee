"""What the two models return without their heads, compared token by token.

B batch, N tokens, d hidden size.
"""

import torch
from torch import Tensor
from torch.nn import functional

from minilm.errors import UsageError
from minilm.models.batches import Batch, token_mask
from minilm.models.observe import Needs, Observed
from minilm.objectives.term import Term, Unit


class HiddenCosine(Term):
    """1 - cos of the last hidden states as the part "cosine", its mean over the tokens (DistilBERT, section 2).

    Args:
        weight: of the part in the loss.

    Raises (from `forward`):
        ValueError: models of unequal widths.
    """

    unit: Unit = "tokens"
    teacher = student = Needs(final=True)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.parts = {"cosine": weight}

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert teacher.final is not None
        assert student.final is not None
        widths = teacher.final.shape[2], student.final.shape[2]
        if widths[0] != widths[1]:
            raise UsageError(
                f"the cosine of last hidden states needs one width: the teacher's is {widths[0]}, the student's "
                f"{widths[1]}; leave out --student_hidden_size, or choose another objective"
            )
        finals, mask = [x.flatten(0, 1) for x in (teacher.final.detach(), student.final)], token_mask(batch)
        if mask is not None:  # one index for both: finding it waits for the device
            index = mask.flatten().nonzero().squeeze(1)
            finals = [x.index_select(0, index) for x in finals]
        rows_t, rows_s = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in finals)
        mean = (1 - functional.cosine_similarity(rows_t, rows_s, dim=1)).sum() / max(1, len(rows_s))
        return self.parts["cosine"] * mean, {"cosine": mean.detach()}
