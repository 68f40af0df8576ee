"""Relation heads: the views of a model's heads that a relation compares.

MiniLMv2 (section 3.1) concatenates the attention heads of a token and splits the result again into R relation heads,
so that teacher and student may have any numbers of heads. B batch, H heads of the model, N tokens, D head dimension.
"""

from collections.abc import Sequence

from torch import Tensor


def relation_head_shape(x: Sequence[int], y: Sequence[int], relation_heads: int | None, whose: str) -> tuple[int, int]:
    """R and d of the two sides of a relation, out of their shapes (B, H, N, D)."""
    (_, heads_x, _, dim_x), (_, heads_y, _, dim_y) = x, y
    heads = max(heads_x, heads_y)
    if heads % heads_x or heads % heads_y:
        raise ValueError(
            f"the {whose}'s head counts {heads_x} and {heads_y} differ and the larger is no multiple of the smaller"
        )
    for dim in (dim_x, dim_y):
        if relation_heads is not None and heads * dim % relation_heads:
            raise ValueError(
                f"relation_heads={relation_heads} does not divide the {whose}'s width {heads * dim}, "
                f"{heads} heads of {dim}"
            )
    if relation_heads is not None:
        dim_x, dim_y, heads = heads * dim_x // relation_heads, heads * dim_y // relation_heads, relation_heads
    if dim_x != dim_y:
        raise ValueError(f"the {whose}'s head dimensions {dim_x} and {dim_y} differ, so their products do not exist")
    return heads, dim_x


def relation_pair(x: Tensor, y: Tensor, relation_heads: int | None) -> tuple[Tensor, Tensor]:
    """Relation heads of the two sides of a relation, each (B, R, N, d); `y is x` stays so.

    A side with fewer heads (grouped keys and values) is repeated, as attention does. Re-splitting is a view where the
    heads of a token are adjacent in memory, else one copy.
    """
    if y is x:
        x = _split(x, relation_heads)
        return x, x
    heads = max(x.shape[1], y.shape[1])
    x, y = _repeat(x, heads), _repeat(y, heads)
    return _split(x, relation_heads), _split(y, relation_heads)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _split(x: Tensor, relation_heads: int | None) -> Tensor:
    """(B, H, N, D) -> (B, R, N, H·D/R)."""
    batch, heads, length, _ = x.shape
    if relation_heads is None or relation_heads == heads:
        return x
    return x.transpose(1, 2).reshape(batch, length, relation_heads, -1).transpose(1, 2)
