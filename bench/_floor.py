"""The least time that a case can take on a device: bytes, products and exponentials counted, and the device's rates.

An element is one allowed (row, key) pair of one head of one relation. A launch cannot be faster than the slowest of
three units: memory (each input read once, each output written once), tensor cores and the exponential unit. The floor
is the sum over the launches of the pass structure:

    N ≤ 128           rows on chip        loss, dX and dY from one launch, 2 exponentials an element
    cross relations   forward+dX, dY      two launches, 2 exponentials an element in each
    self relations    forward, rank-1     likewise: p_ij + p_ji = exp(s_ij − lse_i)(1 + exp(lse_i − lse_j))

Only the forward: one launch without gradients. Only the backward: the second launch; where there is none, no floor.
B batch, R relation heads, N tokens, d_T and d_S dimensions of a relation head of teacher and student.
"""

from typing import NamedTuple

from _cases import DTYPES, Case

ON_CHIP = 128  # longest row block that stays in registers
EXPONENTIALS = 2  # an element and launch: one for the teacher, one for the student


class Rates(NamedTuple):
    """What a device does in a second."""

    bytes: float  # read plus written, by a copy
    flops: float  # of a matrix product in the case's dtype
    exps: float


class Launch(NamedTuple):
    """What one kernel must do."""

    bytes: float
    flops: float
    exps: float

    def seconds(self, rates: Rates) -> float:
        return max(self.bytes / rates.bytes, self.flops / rates.flops, self.exps / rates.exps)


def floor_ms(case: Case, mode: str, rates: Rates) -> float | None:
    """Milliseconds, all relations together; None where the structure does nothing in this mode."""
    launches = [launch for relation in case.relations for launch in _launches(case, relation, mode)]
    return sum(launch.seconds(rates) for launch in launches) * 1e3 if launches else None


def _launches(case: Case, relation: str, mode: str) -> list[Launch]:
    is_self = relation[0] == relation[1]
    rows = case.tokens * case.heads
    elements = case.pairs * case.heads
    size = DTYPES[case.dtype].itemsize
    sides = 1 if is_self else 2
    inputs = rows * sides * (case.d_t + case.d_s) * size
    gradient = rows * case.d_s * size  # of one side
    losses, lse = rows * 4, rows * 8  # float32, lse of both models
    d_t, d_s = _padded(case.d_t), _padded(case.d_s)

    def launch(traffic: float, flops_per_element: int) -> Launch:
        return Launch(traffic, elements * flops_per_element, elements * EXPONENTIALS)

    scores = 2 * d_t + 2 * d_s
    if mode == "forward":
        return [launch(inputs + losses, scores)]
    if case.n <= ON_CHIP:
        everything = launch(inputs + losses + sides * gradient, scores + 4 * d_s)
        return [everything] if mode == "both" else []
    if is_self:
        first = launch(inputs + losses + lse, scores)
    else:  # two accumulators for dX: softmax(s) Y and softmax(t) Y
        first = launch(inputs + losses + lse + gradient, scores + 4 * d_s)
    second = launch(inputs + lse + gradient, scores + 2 * d_s)
    return [first, second] if mode == "both" else [second]


def _padded(dim: int) -> int:
    """Tensor cores multiply in steps of 16."""
    return max(16, -(-dim // 16) * 16)
