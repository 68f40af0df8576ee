"""What the layouts of the tensors decide: whether they fit, which relations share a launch, and their constants.

Nothing here reads a value, so that all calls of one kind share one answer, which is kept.
B batch, H heads of a model, R relation heads, N tokens, D head dimension.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilm_kernels import _checks as checks
from minilm_kernels._checks import Layout
from minilm_kernels._heads import relation_head_shape
from minilm_kernels._relations import Masks, Relations

Call = tuple[
    tuple[tuple[str, float, bool, tuple[Layout, ...]], ...],  # of each relation: name, weight, whether it is a self
    # relation, and its x_t, y_t, x_s, y_s
    int | None,  # relation_heads
    bool,  # whether there is a mask or a packing: row weights come as a tensor then
    bool,  # causal
    float,  # temperature
    str,  # reduction
    str | None,  # implementation
]


class Group(NamedTuple):
    """Relations of equal layout, all self relations or all cross relations: one call of an op takes them."""

    members: list[int]  # their places among the relations of the call
    is_self: bool
    relation_weights: list[float]
    constants: tuple[float, float, float, bool, bool]  # weight, scale_t, scale_s, symmetric, sums of `Relations`


class Grouping(NamedTuple):
    groups: list[Group]
    implementation: str
    splits_heads: bool  # whether relation heads are other than the models' heads, in any tensor
    wide: torch.dtype  # of losses and row weights


def layout(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype, x.device


def grouping(call: Call) -> Grouping:
    """The relations of a call, checked and grouped; the errors are those of `fused_minilm_loss`."""
    relations, relation_heads, has_row_weights, causal, temperature, reduction, implementation = call
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
        kind = is_self, layouts
        for known, group in groups:  # compared, not hashed: a hash would fix the lengths of a compiled graph
            if known == kind:
                group.members.append(place)
                group.relation_weights.append(relation_weight)
                break
        else:
            rows = heads * (1 if has_row_weights else batch * length)
            constants = (
                1.0 if reduction in ("sum", "none") else 1.0 / rows,
                1 / (math.sqrt(d_t) * temperature),
                1 / (math.sqrt(d_s) * temperature),
                not causal,
                reduction != "none",
            )
            groups.append((kind, Group([place], is_self, [relation_weight], constants)))
    dtypes = [dtype for _, _, _, layouts in relations for _, _, dtype, _ in layouts]
    device = relations[0][3][0][3]
    chosen = checks.choose_implementation(implementation, device.type, max(dims), torch.float64 in dtypes)
    wide = torch.promote_types(relations[0][3][2][2], torch.float32)
    return Grouping([group for _, group in groups], chosen, splits_heads, wide)


known_grouping = lru_cache(maxsize=256)(grouping)


def relation_groups(
    groups: Sequence[Group], teacher: Sequence[Tensor], student: Sequence[Tensor], masks: Masks
) -> list[Relations]:
    """The groups with their tensors: of each group x of every relation, then y, if they are cross relations."""
    filled, start = [], 0
    for members, is_self, _, constants in groups:
        middle = start + len(members)
        end = middle if is_self else middle + len(members)
        tensors = teacher[start:middle], teacher[middle:end], student[start:middle], student[middle:end]
        fields: tuple[Any, ...] = *tensors, *masks, *constants
        filled.append(Relations(*fields))
        start = end
    return filled


def weighted_total(groups: Sequence[Group], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ relation weight · loss, and the losses (relations,) unweighted, of the losses of each group.

    Of rows, which one group only has: the rows, twice.
    """
    parts = torch.cat(values) if len(values) > 1 else values[0]
    *_, sums = groups[0].constants
    if not sums:
        return parts, parts.detach()
    weights = [weight for group in groups for weight in group.relation_weights]
    if all([weight == 1 for weight in weights]):
        return parts.sum(), parts
    return torch.cat([part * weight for part, weight in zip(parts.split(1), weights, strict=True)]).sum(), parts
