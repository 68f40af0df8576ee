"""Time of one call of the loss and its backward where the tensors are tiny, over a bare autograd Function's.

    pytest bench/test_overhead.py --benchmark-only

Both run the same ops on the same tensors; the difference of the two medians is what the library's own Python costs a
call. B batch, R relation heads, N tokens, D head dimension.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minilm import fused_minilm_loss
from minilm_kernels import _ops
from minilm_kernels._relations import Relations

B, R, N, D = 1, 2, 8, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATION = "triton" if DEVICE == "cuda" else "chunked"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FORWARD, BACKWARD = _ops.FORWARD[IMPLEMENTATION], _ops.BACKWARD_IN_PLACE[IMPLEMENTATION]

Triple = tuple[Tensor, Tensor, Tensor]


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: list[Relations], *student: Tensor) -> Tensor:
        results = [FORWARD(*group, True) for group in groups]
        ctx.saved = groups, results
        return torch.cat([value for value, *_ in results]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None]
        for group, (_, lse_t, lse_s, dx, dy) in zip(*ctx.saved, strict=True):
            dx = dx or [torch.empty_like(x) for x in group.x_s]
            dy = dy or [torch.empty_like(y) for y in group.y_s]
            BACKWARD(*group, lse_t, lse_s, grad, [1.0] * len(group.x_s), dx, dy)
            gradients += [*dx, *dy]
        return tuple(gradients)


@pytest.fixture
def tensors() -> tuple[Triple, Triple]:
    """Teacher and student, (B, R, N, D) each."""
    torch.manual_seed(0)
    q, k, v, *student = (torch.randn(B, R, N, D, device=DEVICE).to(DTYPE) for _ in range(6))
    q_s, k_s, v_s = (x.requires_grad_() for x in student)
    return (q, k, v), (q_s, k_s, v_s)


def bare_loss(teacher: Triple, student: Triple) -> Tensor:
    """MiniLM v1 as `fused_minilm_loss` calls the ops: QK, then VV."""
    (q, k, v), (q_s, k_s, v_s) = teacher, student
    rest = (None, None, None, 1 / (B * R * N), 1 / math.sqrt(D), 1 / math.sqrt(D), True, True)
    qk, vv = Relations([q], [k], [q_s.detach()], [k_s.detach()], *rest), Relations([v], [], [v_s.detach()], [], *rest)
    return _Bare.apply([qk, vv], q_s, k_s, v_s)  # type: ignore[no-any-return]


def test_they_agree(tensors: tuple[Triple, Triple]) -> None:
    teacher, student = tensors
    ours = fused_minilm_loss(teacher, student, implementation=IMPLEMENTATION)
    bare = bare_loss(teacher, student)
    torch.testing.assert_close(bare, ours)
    for g, g_bare in zip(torch.autograd.grad(ours, student), torch.autograd.grad(bare, student), strict=True):
        torch.testing.assert_close(g_bare, g)


def test_bare_function(benchmark: Any, tensors: tuple[Triple, Triple]) -> None:
    teacher, student = tensors
    benchmark(lambda: torch.autograd.grad(bare_loss(teacher, student), student))


def test_fused_minilm_loss(benchmark: Any, tensors: tuple[Triple, Triple]) -> None:
    teacher, student = tensors
    benchmark(lambda: torch.autograd.grad(fused_minilm_loss(teacher, student, implementation=IMPLEMENTATION), student))
