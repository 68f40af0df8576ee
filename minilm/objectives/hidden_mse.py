"""Mean squared error of hidden states, layer by layer (TinyBERT, eq. 8 and 9; MobileBERT, eq. 2), as a term.

    part_m = mean over real tokens and features of (h_S W - h_T)²
h_S is of the student's layer m, h_T of the teacher's layer that it learns from; W is one matrix for all layers. Equal
widths need none.

B batch, N tokens, d hidden size of the student, d' of the teacher.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minilm.errors import UsageError
from minilm.models.batches import Batch, token_mask
from minilm.models.observe import Needs, Observed
from minilm.objectives.term import Term, Unit

EMBEDDING = 0  # among the layers
EPSILON = 1e-12  # BERT's


class HiddenMSE(Term):
    """Part "embedding" for layer 0, "hidden_m" for the student's layer m, each with weight 1.

    Args:
        layers: the student's layers, each with the teacher's; 0 is the embeddings.
        projection: from the student's width to the teacher's, without a bias (TinyBERT, section 3.1). It is trained.
        normalised: layer-norms both sides first, without scale and shift (MobileBERT, section 3.4).

    Raises:
        ValueError: no layers; from the forward, widths that differ.
    """

    unit: Unit = "tokens"

    def __init__(
        self, layers: Mapping[int, int], projection: nn.Linear | None = None, normalised: bool = False
    ) -> None:
        super().__init__()
        if not layers:
            raise UsageError(f"layers is {layers!r}: name at least one of the student's and one of the teacher's")
        self.layers = dict(layers)
        self.projection = projection
        self.normalised = normalised
        self.parts = {self._name(layer): 1.0 for layer in layers}
        self.teacher = Needs(hidden=tuple(dict.fromkeys(layers.values())))
        self.student = Needs(hidden=tuple(layers))

    def _name(self, layer: int) -> str:
        return "embedding" if layer == EMBEDDING else f"hidden_{layer}"

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        mask = token_mask(batch)
        parts = {
            self._name(layer): self._mse(student.hidden[layer], teacher.hidden[of_teacher], mask)
            for layer, of_teacher in self.layers.items()
        }
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}

    def _mse(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Both (B, N, d); what stands behind the mask is 0 on both sides from here on."""
        rows = student.shape[0] * student.shape[1]
        count = rows if mask is None else (mask != 0).sum().clamp(min=1)
        student, teacher = (_without_padding(x, mask) for x in (student, teacher.detach()))
        if self.projection is not None:
            student = self.projection(student.to(self.projection.weight.dtype))
        if student.shape[-1] != teacher.shape[-1]:
            raise UsageError(
                f"hidden states of the student are {student.shape[-1]} wide, those of the teacher {teacher.shape[-1]}: "
                "they are compared number by number"
            )
        wide = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student.to(wide), teacher.to(wide)
        if self.normalised:
            student, teacher = (nn.functional.layer_norm(x, x.shape[-1:], eps=EPSILON) for x in (student, teacher))
        return (student - teacher).square().sum() / (count * student.shape[-1])


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask.unsqueeze(-1) != 0, x, 0)
