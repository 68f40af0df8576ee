"""Relation heads: the views of a model's heads that a relation compares.

MiniLMv2 (section 3.1) concatenates the attention heads of a token and splits the result again into R relation heads,
so that teacher and student may have any numbers of heads. B batch, H heads of the model, N tokens, D head dimension.
"""

from torch import Tensor


def relation_pair(x: Tensor, y: Tensor, relation_heads: int | None, whose: str) -> tuple[Tensor, Tensor]:
    """Relation heads of the two sides of a relation, each (B, R, N, d); `y is x` stays so.

    A side with fewer heads (grouped keys and values) is repeated, as attention does. Re-splitting is a view where the
    heads of a token are adjacent in memory, else one copy.
    """
    if y is x:
        x = split_heads(x, relation_heads, whose)
        return x, x
    if x.shape[1] != y.shape[1]:
        x, y = _equal_heads(x, y, whose)
    x, y = split_heads(x, relation_heads, whose), split_heads(y, relation_heads, whose)
    if x.shape[3] != y.shape[3]:
        raise ValueError(
            f"the {whose}'s head dimensions {x.shape[3]} and {y.shape[3]} differ, so their products do not exist"
        )
    return x, y


def _equal_heads(x: Tensor, y: Tensor, whose: str) -> tuple[Tensor, Tensor]:
    heads = max(x.shape[1], y.shape[1])
    if heads % x.shape[1] or heads % y.shape[1]:
        raise ValueError(
            f"the {whose}'s head counts {x.shape[1]} and {y.shape[1]} differ and the larger is no multiple of the "
            "smaller"
        )
    return x.repeat_interleave(heads // x.shape[1], 1), y.repeat_interleave(heads // y.shape[1], 1)


def split_heads(x: Tensor, relation_heads: int | None, whose: str) -> Tensor:
    """(B, H, N, D) -> (B, R, N, H·D/R)."""
    if relation_heads is None:
        return x
    batch, heads, length, dim = x.shape
    if relation_heads == heads:
        return x
    if heads * dim % relation_heads:
        raise ValueError(
            f"relation_heads={relation_heads} does not divide the {whose}'s width {heads * dim}, {heads} heads of {dim}"
        )
    return x.transpose(1, 2).reshape(batch, length, relation_heads, -1).transpose(1, 2)
