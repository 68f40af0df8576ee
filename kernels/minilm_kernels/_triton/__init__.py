"""What the ops `minilm_kernels::triton_{forward,backward}` run: the launches of each structure (see _plan).

G relations, B batch, R relation heads, N tokens.
"""

import torch
from torch import Tensor

from minilm_kernels._relations import Outputs, Relations
from minilm_kernels._triton._keys import key_launch
from minilm_kernels._triton._plan import (
    Problem,
    architecture,
    known_problem,
    persistent_programs,
    problem_fields,
    tiles,
)
from minilm_kernels._triton._resident import resident_launch, scale_launch
from minilm_kernels._triton._rows import row_launch
from minilm_kernels._triton._self import factor_launch, self_launch
from minilm_kernels._triton._wide import wide_launches


def allocate(relations: Relations, needs_gradient: bool) -> Outputs:
    """What `forward` returns, uninitialised; the shapes may be symbols."""
    problem = Problem(*problem_fields(relations))
    return relations.value(), *_buffers(relations, problem, needs_gradient)


def _buffers(
    relations: Relations, problem: Problem, needs_gradient: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """lse_t, lse_s, dx, dy."""
    on_chip = problem.structure == "resident"
    prepares = needs_gradient and problem.structure in ("resident", "cross")
    lse, (parts_t, parts_s) = [], problem.lse_parts
    if needs_gradient and not on_chip:
        first = relations.x_s[0].new_empty(problem.shape, dtype=torch.float32)
        lse = [first, *[torch.empty_like(first) for _ in range(parts_t + parts_s - 1)]]
    dx = [torch.empty_like(x) for x in relations.x_s] if prepares else []
    dy = [torch.empty_like(y) for y in relations.y_s] if needs_gradient and on_chip else []
    return lse[:parts_t], lse[parts_t:], dx, dy


def forward(relations: Relations, needs_gradient: bool) -> Outputs:
    problem = known_problem(*problem_fields(relations))
    lse_t, lse_s, dx, dy = buffers = _buffers(relations, problem, needs_gradient)
    if problem.structure == "resident":
        launch = resident_launch(relations, problem, dx, dy, persistent_programs(problem), architecture(problem.device))
    else:
        shape = tiles("rows" if dx else "forward", problem, architecture(problem.device))
        launch = row_launch(relations, problem, lse_t, lse_s, dx, shape)
    launch.run(problem.device)
    value = launch.operands["value"]
    return value.sum(1) if problem.reduces else value, *buffers


def backward(
    relations: Relations,
    lse_t: list[Tensor],
    lse_s: list[Tensor],
    grad: Tensor,  # () where `reduces`, else (G, B, R, N)
    dx: list[Tensor],
    dy: list[Tensor],
) -> None:
    """Completes dx and dy in place."""
    problem = known_problem(*problem_fields(relations))
    chip = architecture(problem.device)
    match problem.structure:
        case "resident":
            alike = bool(dy) and dx[0].stride() == dy[0].stride()
            groups = [dx + dy] if alike else [gradients for gradients in (dx, dy) if gradients]
            launches = [scale_launch(relations, problem, grad, gradients) for gradients in groups]
        case "self":
            base = lse_t[0].new_empty(problem.shape[:3])
            bases, factors = [base, torch.empty_like(base)], [torch.empty_like(lse_t[0]) for _ in range(2)]
            given = relations, problem, lse_t, lse_s, bases, factors, grad, dx
            launches = [
                factor_launch(problem, lse_t, lse_s, bases, factors),
                self_launch(*given, tiles("self", problem, chip)),
            ]
        case "wide":
            launches = wide_launches(relations, problem, lse_t, lse_s, grad, dx, dy, tiles("wide", problem, chip))
        case _:
            launches = [key_launch(relations, problem, lse_t, lse_s, grad, dx, dy, tiles("keys", problem, chip))]
    for launch in launches:
        launch.run(problem.device)
