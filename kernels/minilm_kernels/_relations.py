"""What one call of an op gets: relations of equal shape, the keys they allow, and the weights of their rows.

B batch, R relation heads, N tokens, d_T and d_S dimensions of a relation head in teacher and student.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Masks = tuple[Tensor | None, Tensor | None, Tensor | None]  # bounds, holes and row_weight of `Relations`


class Relations(NamedTuple):
    """Relations that share shapes, strides and dtypes, and are all self relations or all cross relations."""

    x_t: Sequence[Tensor]  # (B, R, N, d_T) each
    y_t: Sequence[Tensor]  # none for self relations
    x_s: Sequence[Tensor]  # (B, R, N, d_S) each
    y_s: Sequence[Tensor]
    bounds: Tensor | None  # (4, B, N) int32: first key and end of keys of a row; first row and end of rows of a key
    holes: Tensor | None  # (B,) int32: 1 where an interval also holds masked positions; None: nowhere
    row_weight: Tensor | None  # (B or 1, N), equal along a sequence; None: 1
    weight: float  # of every row besides
    relation_weights: list[float]  # of each relation in the loss
    scale_t: float  # of products, positive: 1/√d_T or one's own, over the temperature
    scale_s: float
    symmetric: bool  # whether key j allowed for row i means key i allowed for row j
    reduces: bool  # True: one weighted sum a relation; False: the rows themselves, unweighted

    @property
    def is_self(self) -> bool:
        return not self.y_s

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Relations, B, R, N."""
        batch, heads, length, _ = self.x_s[0].shape
        return len(self.x_s), batch, heads, length

    @property
    def keys_t(self) -> Sequence[Tensor]:
        return self.y_t or self.x_t

    @property
    def keys_s(self) -> Sequence[Tensor]:
        return self.y_s or self.x_s

    @property
    def wide(self) -> torch.dtype:
        """Type of losses and accumulators."""
        return torch.promote_types(self.x_s[0].dtype, torch.float32)

    @property
    def weights_in_gradients(self) -> bool:
        """Whether prepared gradients hold the row weights; float16 could not hold the product."""
        return self.x_s[0].dtype != torch.float16

    @property
    def gradient_scales(self) -> tuple[float, float]:
        """Two factors whose product is scale_s: the first of prepared gradients, the second of what completes them.

        float16 ends at 65504, so what exceeds 1 waits for the row weights.
        """
        waits = max(self.scale_s, 1.0) if self.reduces and not self.weights_in_gradients else 1.0
        return self.scale_s / waits, waits

    def value(self) -> Tensor:
        """Uninitialised: the sums (relations,) or the rows (relations, B, R, N)."""
        shape = self.shape
        return self.x_s[0].new_empty(shape[:1] if self.reduces else shape, dtype=self.wide)


Outputs = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # of the op `forward`, see `_ops`
SCHEMA = (
    "Tensor[] x_t, Tensor[] y_t, Tensor[] x_s, Tensor[] y_s, Tensor? bounds, Tensor? holes, Tensor? row_weight, "
    "float weight, float[] relation_weights, float scale_t, float scale_s, bool symmetric, bool reduces"
)


def weighted_total(relations: Sequence[Relations], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ relation weight · loss, and all losses unweighted in one tensor, of the values that each call of an op gave.

    Where rows are not reduced there is one relation, and both are its rows.
    """
    parts = torch.cat(values) if len(values) > 1 else values[0]
    if not relations[0].reduces:
        return parts, parts.detach()
    weights = [weight for group in relations for weight in group.relation_weights]
    if all([weight == 1 for weight in weights]):
        return parts.sum(), parts
    return torch.cat([part * weight for part, weight in zip(parts.split(1), weights, strict=True)]).sum(), parts
