"""One launch of one kernel of the library without a call of the loss, to time it alone or compile it for another GPU.

The softmax sums that a forward leaves to its backward are made up: they change neither the code nor the work.
"""

import math

import torch
from _cases import Triple
from torch import Tensor

from minilm_kernels._relations import Masks, Relations
from minilm_kernels._triton._keys import key_launch
from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import Problem, Tiles, is_persistent, problem_fields, tiles
from minilm_kernels._triton._resident import resident_launch
from minilm_kernels._triton._rows import row_launch
from minilm_kernels._triton._self import self_launch
from minilm_kernels._triton._wide import wide_launches

# The sweep over rows without dX, that with dX, the sweep for dY, and that for the gradient of a self relation.
SWEEPS = ("forward", "rows", "keys", "self")
KERNELS = (*SWEEPS, "resident", "wide")  # and short sequences, loss and gradients at once; dX of wide heads
OF_SELF_RELATIONS = ("forward", "self")  # the others are launched for cross relations
LSE = 10.0  # base 2; about what 512 keys of random scores have


def make_relations(
    kernel: str, names: tuple[str, ...], teacher: Triple, student: Triple, masks: Masks = (None, None, None)
) -> Relations:
    """What the kernel gets of an objective's relations `names`: its self relations or its cross relations, summed.

    teacher, student: q, k, v, each (B, R, N, d_T) and (B, R, N, d_S).
    """
    is_self = kernel in OF_SELF_RELATIONS
    index = [("qkv".index(name[0]), "qkv".index(name[1])) for name in names if (name[0] == name[1]) == is_self]
    _, _, length, d_s = student[0].shape
    return Relations(
        [teacher[x] for x, _ in index],
        [] if is_self else [teacher[y] for _, y in index],
        [student[x] for x, _ in index],
        [] if is_self else [student[y] for _, y in index],
        *masks,
        weight=1.0 / length,
        relation_weights=[1.0] * len(index),
        scale_t=teacher[0].shape[3] ** -0.5,
        scale_s=d_s**-0.5,
        symmetric=True,
        reduces=True,
    )


def pinned_tiles(kernel: str, relations: Relations, architecture: int) -> Tiles:
    """Those that the library gives the sweep on such a GPU."""
    return tiles(kernel, Problem(*problem_fields(relations)), architecture)


def make_launch(kernel: str, relations: Relations, architecture: int, shape: Tiles | None = None) -> Launch:
    """The launch as the library makes it on such a GPU; of a sweep with tiles of one's own, if given."""
    problem = Problem(*problem_fields(relations))
    dx, dy = [torch.empty_like(x) for x in relations.x_s], [torch.empty_like(y) for y in relations.y_s]
    if kernel == "resident":
        programs = 1 if is_persistent(architecture, problem.shape[3]) else math.prod(problem.shape[:3])
        return resident_launch(relations, problem, dx, dy, programs, architecture)

    def numbers(*sizes: int, value: float = LSE) -> Tensor:
        return torch.full(sizes, value, device=problem.device)

    shape = shape or pinned_tiles(kernel, relations, architecture)
    lse_t, lse_s = ([numbers(*problem.shape, value=-LSE) for _ in range(parts)] for parts in problem.lse_parts)
    if kernel == "forward":
        return row_launch(relations, problem, lse_t, lse_s, [], shape)
    if kernel == "rows":
        return row_launch(relations, problem, lse_t, lse_s, dx, shape)
    grad = numbers()
    if kernel == "wide":
        return wide_launches(relations, problem, lse_t, lse_s, grad, dx, dy, shape)[0]
    if kernel == "keys":
        return key_launch(relations, problem, lse_t, lse_s, grad, dx, dy, shape)
    assert kernel == "self"
    bases, factors = ([numbers(*sizes) for _ in range(2)] for sizes in (problem.shape[:3], problem.shape))
    return self_launch(relations, problem, lse_t, lse_s, bases, factors, grad, dx, shape)
