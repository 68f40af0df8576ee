"""Self-attention relations of some layers (MiniLM, eq. 6 to 10), as a term."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minilm.errors import UsageError
from minilm.models.batches import Batch, relation_mask, relation_qkv
from minilm.models.observe import Needs, Observed
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.term import Term, Unit

LAST_TO_LAST = {-1: -1}


class Relations(Term):
    """The relation loss, summed over pairs of layers.

    Args:
        criterion: the relations and their weights.
        layers: the student's layers, each with the teacher's; 1 to L or -1 to -L. By default the last ones (MiniLM,
            section 3.1). Of several, the parts are named by relation and student layer: "qk_1".

    Raises:
        ValueError: another reduction than "sequence"; no pair of layers.
    """

    unit: Unit = "sequences"

    def __init__(self, criterion: MiniLMLoss, layers: Mapping[int, int] = LAST_TO_LAST) -> None:
        super().__init__()
        if criterion.reduction != "sequence":
            raise UsageError(
                f"a step is the mean over its sequences: reduction must be 'sequence', not {criterion.reduction!r}"
            )
        if not layers:
            raise UsageError(f"layers is {layers!r}: name at least one of the student's and one of the teacher's")
        self.criterion = criterion
        self.layers = dict(layers)
        self.parts = {
            self._name(relation, layer): weight for layer in layers for relation, weight in criterion.relations.items()
        }
        self.teacher = Needs(qkv=tuple(dict.fromkeys(layers.values())))
        self.student = Needs(qkv=tuple(layers))
        self.causal = criterion.causal

    @property
    def identity(self) -> dict[str, Any]:
        return {"relations": self.criterion.relations, "relation_heads": self.criterion.relation_heads}

    def _name(self, relation: str, layer: int) -> str:
        return relation if len(self.layers) == 1 else f"{relation}_{layer}"

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        given = [relation_qkv(teacher.qkv[layer], batch) for layer in self.layers.values()]
        made = [relation_qkv(student.qkv[layer], batch) for layer in self.layers]
        if len(self.layers) == 1:  # by the module's own forward, which may be a subclass's
            return self.criterion(given[0], made[0], **relation_mask(batch))  # type: ignore[no-any-return]
        total, losses = self.criterion.of_layers(given, made, **relation_mask(batch))
        return total, {
            self._name(relation, layer): value
            for layer, of_layer in zip(self.layers, losses, strict=True)
            for relation, value in of_layer.items()
        }
