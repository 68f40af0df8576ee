"""What the layouts of the tensors decide: whether they fit, which relations share a launch, and their constants.

Nothing here reads a value. So calls of equal layouts and options share one answer, which is kept.
B batch, H heads of a model, R relation heads, N tokens, D head dimension.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minilm_kernels import _checks as checks
from minilm_kernels._checks import Layout
from minilm_kernels._heads import relation_head_shape
from minilm_kernels._relations import Masks, Relations

Sides = tuple[Tensor, Tensor, Tensor, Tensor]  # x_t, y_t, x_s, y_s of one relation
Call = tuple[
    tuple[tuple[str, float, bool, tuple[Layout, ...]], ...],  # of each relation: name, weight, whether it is a self
    # relation, and its x_t, y_t, x_s, y_s
    int | None,  # relation_heads
    bool,  # whether there is a mask or a packing: row weights come as a tensor then
    bool,  # causal
    float,  # temperature
    tuple[float | None, float | None],  # scales of teacher and student
    str,  # reduction
    str | None,  # implementation
]


class Group(NamedTuple):
    """Relations of equal layout, all self relations or all cross relations: one call of an op takes them."""

    members: list[int]  # their places among the relations of the call
    is_self: bool
    constants: tuple[float, list[float], float, float, bool, bool]  # of `Relations`, from `weight` on

    def relations(self, sides: Sequence[Sides], masks: Masks) -> Relations:
        """The members, out of the tensors of all relations of the call."""
        x_t, y_t, x_s, y_s = zip(*[sides[member] for member in self.members], strict=True)
        if self.is_self:
            y_t = y_s = ()
        return Relations._make((x_t, y_t, x_s, y_s, *masks, *self.constants))


class Grouping(NamedTuple):
    groups: list[Group]
    order: list[int]  # the members of all groups
    implementation: str
    splits_heads: bool  # whether relation heads are other than the models' heads, in any tensor
    wide: torch.dtype  # of losses and row weights


def layout(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype, x.device


def grouping(call: Call) -> Grouping:
    """The relations of a call, checked and grouped; the errors are those of `fused_minilm_loss`."""
    relations, relation_heads, has_row_weights, causal, temperature, scales, reduction, implementation = call
    checks.check_layouts([(name, layouts) for name, _, _, layouts in relations])
    batch, _, length, _ = relations[0][3][0][0]
    groups: list[tuple[object, Group]] = []
    dims, splits_heads = [], False
    for place, (name, relation_weight, is_self, layouts) in enumerate(relations):
        x_t, y_t, x_s, y_s = (shape for shape, *_ in layouts)
        heads, d_t = relation_head_shape(x_t, y_t, relation_heads, "teacher")
        heads_s, d_s = relation_head_shape(x_s, y_s, relation_heads, "student")
        checks.check_equal_heads(name, heads, heads_s)
        dims += [d_t, d_s]
        splits_heads |= any([shape[1] != heads for shape in (x_t, y_t, x_s, y_s)])
        shared = is_self, layouts
        for other, group in groups:  # compared, not hashed: a hash would fix the lengths of a compiled graph
            if other == shared:
                group.members.append(place)
                group.constants[1].append(relation_weight)
                break
        else:
            rows = heads * (1 if has_row_weights else batch * length)
            constants = (
                1.0 if reduction in ("sum", "none") else 1.0 / rows,
                [relation_weight],
                checks.score_factor("teacher", scales[0], d_t, temperature),
                checks.score_factor("student", scales[1], d_s, temperature),
                not causal,
                reduction != "none",
            )
            groups.append((shared, Group([place], is_self, constants)))
    dtypes = [dtype for _, _, _, layouts in relations for _, _, dtype, _ in layouts]
    device = relations[0][3][0][3]
    chosen = checks.choose_implementation(implementation, device.type, max(dims), torch.float64 in dtypes)
    wide = torch.promote_types(relations[0][3][2][2], torch.float32)
    order = [place for _, group in groups for place in group.members]
    return Grouping([group for _, group in groups], order, chosen, splits_heads, wide)


known_grouping = lru_cache(maxsize=256)(grouping)
