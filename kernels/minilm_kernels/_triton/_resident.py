"""Whole rows on chip, for short sequences: sums and all gradients of a head from one launch, two exponentials a score.

    P = softmax(t),  Q = softmax(s),  G = w (Q − P),   dX = scale_S G Y_S,   dY = scale_S Gᵀ X_S
One program holds the N×N scores of a head in registers; they never reach memory. A self relation gets dX + dY. Where
a head fills a multiprocessor, programs walk over the heads, and the next one is loaded beside the arithmetic of this.

G relations, B batch, R relation heads, N <= BLOCK tokens, D_T and D_S dimensions of a relation head, DIM_T and DIM_S
padded.
"""

import math
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from minilm_kernels._relations import Relations
from minilm_kernels._triton._launch import Launch, Schedule, group, row_weights, shared_arguments, value_buffer
from minilm_kernels._triton._plan import Problem, padded, resident_registers, size_constants
from minilm_kernels._triton._steps import (
    FLOOR,
    LN2,
    head_pointer,
    interval,
    load_tokens,
    log2_ratio,
    pick,
    program,
    store_tokens,
    tile_pointers,
    weight_of,
)


@triton.jit
def resident(
    x_t,  # ((pointers), strides) of G tensors (B, R, N, D_T)
    y_t,  # None for self relations
    x_s,  # of G tensors (B, R, N, D_S)
    y_s,
    bounds,  # (4, B, N) or None
    row_weight,  # (pointer, strides) of (B, N), or None
    value,  # (programs,), Σ weight · KL of each
    dx,  # of G tensors (B, R, N, D_S), or None
    dy,
    scales,  # scale_t log2 e, scale_s log2 e, scale_s, weight
    B,
    R,
    N,
    heads,  # G B R
    PERSISTENT: tl.constexpr,  # whether a program takes several heads
    SAME_KEYS: tl.constexpr,  # whether all rows of a sequence see the same keys, its tokens
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,  # whether N = BLOCK
    D_T: tl.constexpr,
    D_S: tl.constexpr,
    DIM_T: tl.constexpr,
    DIM_S: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    inside = offs < N
    rounds = tl.cdiv(heads - tl.program_id(0), tl.num_programs(0)) if PERSISTENT else 1
    for turn in tl.range(rounds, disable_licm=True):  # what would be taken out of the loop, registers could not hold
        index = tl.program_id(0) + turn * tl.num_programs(0)
        head, batch, relation = index % R, index // R % B, index // R // B
        token = inside
        if bounds is not None:
            first, end = interval(bounds, 0, batch, 0, B, N, BLOCK)
            token = first < end
        own_t = load_tokens(x_t, head_pointer(x_t, relation, batch, head), 0, token, D_T, DIM_T, BLOCK)
        own_s = load_tokens(x_s, head_pointer(x_s, relation, batch, head), 0, token, D_S, DIM_S, BLOCK)
        if y_t is None:
            key_t, key_s = own_t, own_s
        else:
            key_t = load_tokens(y_t, head_pointer(y_t, relation, batch, head), 0, token, D_T, DIM_T, BLOCK)
            key_s = load_tokens(y_s, head_pointer(y_s, relation, batch, head), 0, token, D_S, DIM_S, BLOCK)
        t = tl.dot(own_t, key_t.T, input_precision=PRECISION)
        s = tl.dot(own_s, key_s.T, input_precision=PRECISION)
        if bounds is not None:
            allowed = token[None, :]
            if not SAME_KEYS:
                allowed = allowed & (offs[None, :] >= first[:, None]) & (offs[None, :] < end[:, None])
            t, s = tl.where(allowed, t, FLOOR), tl.where(allowed, s, FLOOR)
        elif not WHOLE:
            t, s = tl.where(inside[None, :], t, FLOOR), tl.where(inside[None, :], s, FLOOR)

        t = tl.fma(t, scales[0], -(tl.max(t, 1) * scales[0])[:, None])
        s = tl.fma(s, scales[1], -(tl.max(s, 1) * scales[1])[:, None])
        p, q = tl.exp2(t), tl.exp2(s)
        l_t, l_s = tl.sum(p, 1), tl.sum(q, 1)
        kl = LN2 * (tl.sum(p * (t - s), 1) / l_t + log2_ratio(l_s, l_t))
        weight = weight_of(row_weight, scales[3], batch, 0, inside, BLOCK)
        tl.store(value + index, tl.sum(tl.where(token, kl * weight, 0.0), 0))
        if dx is not None:
            g = q * tl.where(token, 1.0 / l_s, 0.0)[:, None] - p * tl.where(token, 1.0 / l_t, 0.0)[:, None]
            g = g.to(own_s.dtype)
            factor = weight * scales[2] if WEIGHTED else tl.full([BLOCK], 1.0, tl.float32) * scales[2]
            gradient = tl.dot(g, key_s, input_precision=PRECISION)
            if dy is None:
                gradient = tl.dot(g.T, own_s, gradient, input_precision=PRECISION)
            else:
                other = tl.dot(g.T, own_s, input_precision=PRECISION) * factor[:, None]
                store_tokens(dy, head_pointer(dy, relation, batch, head), 0, other, inside, D_S, DIM_S, BLOCK)
            gradient *= factor[:, None]
            store_tokens(dx, head_pointer(dx, relation, batch, head), 0, gradient, inside, D_S, DIM_S, BLOCK)


@triton.jit
def scale_in_place(
    gradients,  # ((pointers), strides) of G tensors (B, R, N, D_S)
    row_weight,  # (pointer, strides) of (B, N), or None
    grad,  # of the weighted sum, one number
    relation_weights,
    weight,
    B,
    R,
    N,
    WEIGHTED: tl.constexpr,
    D_S: tl.constexpr,
    DIM_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies gradients by that of the loss, and by the row weights unless they hold them; does nothing for 1."""
    tile, head, batch, relation = program(tl.cdiv(N, BLOCK), R, B)
    n = tile * BLOCK
    inside = n + tl.arange(0, BLOCK) < N
    factor = tl.load(grad) * pick(relation_weights, relation)
    own = tl.full([BLOCK], 1.0, tl.float32) * factor
    if not WEIGHTED:
        own *= weight_of(row_weight, weight, batch, n, inside, BLOCK)
    if (factor != 1.0) | (not WEIGHTED):
        pointers = tile_pointers(gradients, head_pointer(gradients, relation, batch, head), n, BLOCK, DIM_S)
        mask = inside[:, None] & (tl.arange(0, DIM_S) < D_S)[None, :]
        scaled = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * own[:, None]
        tl.store(pointers, scaled.to(pointers.dtype.element_ty), mask=mask)


def resident_launch(
    relations: Relations, problem: Problem, dx: list[Tensor], dy: list[Tensor], programs: int, architecture: int
) -> Launch:
    same_keys = relations.holes is not None and problem.symmetric
    operands = {
        **shared_arguments(relations),
        "y_t": group(relations.y_t),
        "y_s": group(relations.y_s),
        "value": value_buffer(relations, problem, math.prod(problem.shape[:3])),
        "dx": group(dx),
        "dy": group(dy),
    }
    return Launch(_schedule(problem, same_keys, programs, architecture), operands)


@lru_cache(maxsize=1024)
def _schedule(problem: Problem, same_keys: bool, programs: int, architecture: int) -> Schedule:
    heads, block = math.prod(problem.shape[:3]), padded(problem.shape[3])
    persistent = programs < heads
    num_warps = max(1, block // (8 if problem.element_size > 2 else 16))
    constants = size_constants(problem) | {
        "heads": heads,
        "PERSISTENT": persistent,
        "SAME_KEYS": same_keys,
        "WEIGHTED": problem.weights_in_gradients,
        "WHOLE": problem.shape[3] == block,
        "BLOCK": block,
    }
    registers = resident_registers(architecture, problem.shape[3], max(problem.d_t, problem.d_s))
    return Schedule(resident, programs, constants, num_warps, 3 if persistent else 1, registers)


def scale_launch(relations: Relations, problem: Problem, grad: Tensor, gradients: list[Tensor]) -> Launch:
    both = len(gradients) // problem.shape[0]  # dx and dy, or one of them
    operands = {
        "gradients": group(gradients),
        "row_weight": row_weights(relations.row_weight),
        "grad": grad,
        "relation_weights": tuple(relations.relation_weights) * both,
        "weight": relations.weight * relations.gradient_scales[1],
    }
    return Launch(_scale_schedule(problem, both), operands)


@lru_cache(maxsize=1024)
def _scale_schedule(problem: Problem, both: int) -> Schedule:
    _, batch, heads, length = problem.shape
    constants = {
        "B": batch,
        "R": heads,
        "N": length,
        "WEIGHTED": problem.weights_in_gradients,
        "D_S": problem.d_s,
        "DIM_S": padded(problem.d_s),
        "BLOCK": padded(length),
    }
    return Schedule(scale_in_place, math.prod(problem.shape[:3]) * both, constants, 4, 1)
