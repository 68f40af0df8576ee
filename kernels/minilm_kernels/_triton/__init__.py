"""What the ops `minilm_kernels::triton_{forward,backward}` run: the launches of each structure (see _plan).

G relations, B batch, R relation heads, N tokens.
"""

import math
from functools import partial

import torch
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._keys import key_sweep
from minilm_kernels._triton._launch import Launch, group, lse_argument, row_weights
from minilm_kernels._triton._plan import Kind, Tiles, kind_fields, known_kind, padded, swept, whole
from minilm_kernels._triton._resident import resident, scale_in_place
from minilm_kernels._triton._rows import row_sweep
from minilm_kernels._triton._self import key_factors, self_sweep
from minilm_kernels._triton._tune import planned

LOG2_E = 1.4426950408889634
Outputs = tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]


def allocate(relations: Relations, needs_gradient: bool) -> Outputs:
    """What `forward` returns, uninitialised; the shapes may be symbols."""
    kind = Kind(*kind_fields(relations))
    return relations.value(), *_buffers(relations, kind, needs_gradient)


def _buffers(
    relations: Relations, kind: Kind, needs_gradient: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """lse_t, lse_s, dx, dy."""
    on_chip = kind.structure == "resident"
    parts = kind.lse_parts if needs_gradient and not on_chip else 0
    lse_t = relations.x_s[0].new_empty((parts, *kind.shape), dtype=torch.float32)
    lse_s = torch.empty_like(lse_t)
    dx = [torch.empty_like(x) for x in relations.x_s] if needs_gradient and kind.structure != "self" else []
    dy = [torch.empty_like(y) for y in relations.y_s] if needs_gradient and on_chip else []
    return lse_t, lse_s, dx, dy


def forward(relations: Relations, needs_gradient: bool) -> Outputs:
    kind = known_kind(*kind_fields(relations))
    lse_t, lse_s, dx, dy = buffers = _buffers(relations, kind, needs_gradient)
    if kind.structure == "resident":
        launch = resident_launch(relations, kind, dx, dy)
    else:
        build = partial(row_launch, relations, kind, lse_t, lse_s, dx)
        launch = planned("rows" if dx else "forward", kind, build)
    launch.run(kind.device)
    value = launch.arguments["value"]
    return value.sum(1) if kind.sums else value, *buffers


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
    kind = known_kind(*kind_fields(relations))
    match kind.structure:
        case "resident":
            alike = bool(dy) and dx[0].stride() == dy[0].stride()
            groups = [dx + dy] if alike else [gradients for gradients in (dx, dy) if gradients]
            launches = [scale_launch(relations, kind, grad, relation_weights, gradients) for gradients in groups]
        case "self":
            bases, factors = ([lse_t.new_empty(shape) for _ in range(2)] for shape in (kind.shape[:3], kind.shape))
            build = partial(self_launch, relations, kind, lse_t, lse_s, bases, factors, grad, relation_weights, dx)
            launches = [factor_launch(kind, lse_t, lse_s, bases, factors), planned("self", kind, build)]
        case _:
            build = partial(key_launch, relations, kind, lse_t, lse_s, grad, relation_weights, dx, dy)
            launches = [planned("keys", kind, build)]
    for launch in launches:
        launch.run(kind.device)


def _shared(relations: Relations) -> dict[str, object]:
    """Arguments that all kernels with scores have, beside the constants."""
    return {
        "x_t": group(relations.x_t),
        "x_s": group(relations.x_s),
        "bounds": relations.bounds,
        "row_weight": row_weights(relations.row_weight),
        "scales": (relations.scale_t * LOG2_E, relations.scale_s * LOG2_E, relations.scale_s, relations.weight),
    }


def _values(relations: Relations, kind: Kind, programs: int) -> Tensor:
    """Where the kernels put the losses: of each program, or of each row."""
    shape = (kind.shape[0], programs // kind.shape[0]) if kind.sums else kind.shape
    return relations.x_s[0].new_empty(shape, dtype=torch.float32)


def row_launch(
    relations: Relations, kind: Kind, lse_t: Tensor, lse_s: Tensor, dx: list[Tensor], shape: Tiles
) -> Launch:
    block_m, block_n, num_warps, num_stages = shape
    programs, constants = swept(kind, block_m, block_n)
    arguments = {
        **constants,
        **_shared(relations),
        "y_t": group(relations.keys_t),
        "y_s": group(relations.keys_s),
        "holes": relations.holes,
        "value": _values(relations, kind, programs),
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "dx": group(dx),
        "SUMS": kind.sums,
        "FOLD": kind.sums and kind.folds_weight,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return Launch(row_sweep, programs, arguments, num_warps, num_stages)


def key_launch(
    relations: Relations,
    kind: Kind,
    lse_t: Tensor,
    lse_s: Tensor,
    grad: Tensor,
    relation_weights: list[float],
    dx: list[Tensor],
    dy: list[Tensor],
    shape: Tiles,
) -> Launch:
    block_m, block_n, num_warps, num_stages = shape
    programs, constants = swept(kind, block_n, block_m)
    unit = None
    if not kind.sums:
        unit = grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        grad = (grad / unit).contiguous()
    arguments = {
        **constants,
        **_shared(relations),
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
        "SUMS": kind.sums,
        "FOLD": kind.folds_weight,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return Launch(key_sweep, programs, arguments, num_warps, num_stages)


def factor_launch(kind: Kind, lse_t: Tensor, lse_s: Tensor, bases: list[Tensor], factors: list[Tensor]) -> Launch:
    arguments = {
        "lse_t": lse_argument(lse_t),
        "lse_s": lse_argument(lse_s),
        "base_t": bases[0],
        "base_s": bases[1],
        "factor_t": factors[0],
        "factor_s": factors[1],
        "N": kind.shape[3],
    }
    return Launch(key_factors, math.prod(kind.shape[:3]), arguments, 4, 1)


def self_launch(
    relations: Relations,
    kind: Kind,
    lse_t: Tensor,
    lse_s: Tensor,
    bases: list[Tensor],
    factors: list[Tensor],
    grad: Tensor,
    relation_weights: list[float],
    dx: list[Tensor],
    shape: Tiles,
) -> Launch:
    block_m, block_n, num_warps, num_stages = shape
    programs, constants = swept(kind, block_m, block_n)
    arguments = {
        **constants,
        **_shared(relations),
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
    }
    return Launch(self_sweep, programs, arguments, num_warps, num_stages)


def resident_launch(relations: Relations, kind: Kind, dx: list[Tensor], dy: list[Tensor]) -> Launch:
    programs, block = math.prod(kind.shape[:3]), padded(kind.shape[3])
    arguments = {
        **whole(kind),
        **_shared(relations),
        "y_t": group(relations.y_t),
        "y_s": group(relations.y_s),
        "value": _values(relations, kind, programs),
        "dx": group(dx),
        "dy": group(dy),
        "FOLD": kind.folds_weight,
        "WHOLE": kind.shape[3] == block,
        "BLOCK": block,
    }
    return Launch(resident, programs, arguments, max(1, block // (8 if kind.element_size > 2 else 16)), 1)


def scale_launch(
    relations: Relations, kind: Kind, grad: Tensor, relation_weights: list[float], gradients: list[Tensor]
) -> Launch:
    both = len(gradients) // kind.shape[0]  # dx and dy, or one of them
    arguments = {
        "gradients": group(gradients),
        "row_weight": row_weights(relations.row_weight),
        "grad": grad,
        "relation_weights": tuple(relation_weights) * both,
        "weight": relations.weight,
        "B": kind.shape[1],
        "R": kind.shape[2],
        "N": kind.shape[3],
        "FOLD": kind.folds_weight,
        "D_S": kind.d_s,
        "DIM_S": padded(kind.d_s),
        "BLOCK": padded(kind.shape[3]),
    }
    return Launch(scale_in_place, math.prod(kind.shape[:3]) * both, arguments, 4, 1)
