"""What the ops `minilm_kernels::triton_{forward,backward}` run: the launches of each structure (see _plan).

G relations, B batch, R relation heads, N tokens.
"""

from functools import partial

import torch
import triton
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._keys import key_sweep
from minilm_kernels._triton._launch import Launch, group, lse_argument, row_weights
from minilm_kernels._triton._plan import Tiles, dimensions, lse_parts, padded, structure
from minilm_kernels._triton._resident import resident, scale_in_place
from minilm_kernels._triton._rows import row_sweep
from minilm_kernels._triton._self import key_factors, self_sweep
from minilm_kernels._triton._tune import planned

LOG2_E = 1.4426950408889634
Outputs = tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]


def allocate(relations: Relations, needs_gradient: bool) -> Outputs:
    """What `forward` returns, uninitialised."""
    value = relations.value()
    kind = structure(relations)
    has_lse = needs_gradient and kind != "resident"
    parts = lse_parts(relations) if has_lse else 0
    lse_t, lse_s = (value.new_empty((parts, *relations.shape)) for _ in range(2))
    dx = [torch.empty_like(x) for x in relations.x_s] if needs_gradient and kind != "self" else []
    dy = [torch.empty_like(y) for y in relations.y_s] if needs_gradient and kind == "resident" else []
    return value, lse_t, lse_s, dx, dy


def forward(relations: Relations, needs_gradient: bool) -> Outputs:
    outputs = allocate(relations, needs_gradient)
    value, lse_t, lse_s, dx, dy = outputs
    if structure(relations) == "resident":
        launch = resident_launch(relations, value, dx, dy)
    else:
        build = partial(row_launch, relations, value, lse_t, lse_s, dx)
        launch = planned("rows" if dx else "forward", relations, build)
    launch.run(value.device)
    if relations.sums:
        torch.sum(launch.arguments["value"].view(len(value), -1), 1, out=value)
    return outputs


def backward(
    relations: Relations,
    lse_t: Tensor,
    lse_s: Tensor,
    grad: Tensor,  # () with sums, else (G, B, R, N)
    relation_weights: list[float],
    dx: list[Tensor],
    dy: list[Tensor],
) -> None:
    """Completes dx and dy in place."""
    kind = structure(relations)
    if kind == "resident":
        launches = [scale_launch(relations, grad, relation_weights, gradients) for gradients in (dx, dy) if gradients]
    elif kind == "self":
        bases, factors = ([torch.empty_like(x) for _ in range(2)] for x in (lse_t[0, ..., 0], lse_t[0]))
        build = partial(self_launch, relations, lse_t, lse_s, bases, factors, grad, relation_weights, dx)
        launches = [factor_launch(relations, lse_t, lse_s, bases, factors), planned("self", relations, build)]
    else:
        build = partial(key_launch, relations, lse_t, lse_s, grad, relation_weights, dx, dy)
        launches = [planned("keys", relations, build)]
    for launch in launches:
        launch.run(grad.device)


def _shared(relations: Relations) -> dict[str, object]:
    """Arguments that all kernels with scores have."""
    _, batch, heads, length = relations.shape
    return {
        "x_t": group(relations.x_t),
        "x_s": group(relations.x_s),
        "bounds": relations.bounds,
        "row_weight": row_weights(relations.row_weight),
        "scales": (relations.scale_t * LOG2_E, relations.scale_s * LOG2_E, relations.scale_s, relations.weight),
        "B": batch,
        "R": heads,
        "N": length,
        **dimensions(relations),
    }


def row_launch(
    relations: Relations, value: Tensor, lse_t: Tensor, lse_s: Tensor, dx: list[Tensor], shape: Tiles
) -> Launch:
    count, batch, heads, length = relations.shape
    block_m, block_n, num_warps, num_stages = shape
    programs = triton.cdiv(length, block_m) * heads * batch * count
    arguments = _shared(relations) | {
        "y_t": group(relations.keys_t),
        "y_s": group(relations.keys_s),
        "holes": relations.holes,
        "value": value.new_empty(programs) if relations.sums else value,
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "dx": group(dx),
        "SUMS": relations.sums,
        "FOLD": relations.sums and relations.folds_weight,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "FILLED": length >= block_n,
        "TAIL": max(16, block_n // 2),
    }
    return Launch(row_sweep, programs, arguments, num_warps, num_stages)


def key_launch(
    relations: Relations,
    lse_t: Tensor,
    lse_s: Tensor,
    grad: Tensor,
    relation_weights: list[float],
    dx: list[Tensor],
    dy: list[Tensor],
    shape: Tiles,
) -> Launch:
    count, batch, heads, length = relations.shape
    block_m, block_n, num_warps, num_stages = shape
    unit = None
    if not relations.sums:
        unit = grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        grad = (grad / unit).contiguous()
    arguments = _shared(relations) | {
        "y_t": group(relations.keys_t),
        "y_s": group(relations.keys_s),
        "holes": relations.holes,
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "grad": grad,
        "unit": unit,
        "relation_weights": tuple(relation_weights),
        "dx": group(dx),
        "dy": group(dy),
        "SUMS": relations.sums,
        "FOLD": relations.folds_weight,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "FILLED": length >= block_m,
        "TAIL": max(16, block_m // 2),
    }
    programs = triton.cdiv(length, block_n) * heads * batch * count
    return Launch(key_sweep, programs, arguments, num_warps, num_stages)


def factor_launch(
    relations: Relations, lse_t: Tensor, lse_s: Tensor, bases: list[Tensor], factors: list[Tensor]
) -> Launch:
    count, batch, heads, length = relations.shape
    arguments = {
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "base_t": bases[0],
        "base_s": bases[1],
        "factor_t": factors[0],
        "factor_s": factors[1],
        "N": length,
    }
    return Launch(key_factors, count * batch * heads, arguments, 4, 1)


def self_launch(
    relations: Relations,
    lse_t: Tensor,
    lse_s: Tensor,
    bases: list[Tensor],
    factors: list[Tensor],
    grad: Tensor,
    relation_weights: list[float],
    dx: list[Tensor],
    shape: Tiles,
) -> Launch:
    count, batch, heads, length = relations.shape
    block_m, block_n, num_warps, num_stages = shape
    arguments = _shared(relations) | {
        "holes": relations.holes,
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "bases": tuple(bases),
        "factors": tuple(factors),
        "grad": grad,
        "relation_weights": tuple(relation_weights),
        "dx": group(dx),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "FILLED": length >= block_n,
        "TAIL": max(16, block_n // 2),
    }
    programs = triton.cdiv(length, block_m) * heads * batch * count
    return Launch(self_sweep, programs, arguments, num_warps, num_stages)


def resident_launch(relations: Relations, value: Tensor, dx: list[Tensor], dy: list[Tensor]) -> Launch:
    count, batch, heads, length = relations.shape
    block, programs = padded(length), heads * batch * count
    arguments = _shared(relations) | {
        "y_t": group(relations.y_t),
        "y_s": group(relations.y_s),
        "value": value.new_empty(programs),
        "dx": group(dx),
        "dy": group(dy),
        "FOLD": relations.folds_weight,
        "WHOLE": length == block,
        "BLOCK": block,
    }
    size = max(relations.x_t[0].element_size(), relations.x_s[0].element_size())
    return Launch(resident, programs, arguments, max(1, block // (8 if size > 2 else 16)), 1)


def scale_launch(relations: Relations, grad: Tensor, relation_weights: list[float], gradients: list[Tensor]) -> Launch:
    count, batch, heads, length = relations.shape
    dim, block = relations.x_s[0].shape[3], padded(length)
    arguments = {
        "gradients": group(gradients),
        "row_weight": row_weights(relations.row_weight),
        "grad": grad,
        "relation_weights": tuple(relation_weights),
        "weight": relations.weight,
        "B": batch,
        "R": heads,
        "N": length,
        "FOLD": relations.folds_weight,
        "D_S": dim,
        "DIM_S": padded(dim),
        "BLOCK": block,
    }
    return Launch(scale_in_place, heads * batch * count, arguments, 4, 1)
