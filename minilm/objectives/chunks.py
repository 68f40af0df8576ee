"""A loss of the logits of many rows, which are never held as a whole.

    L = T² Σ loss(q),   q = softmax(z / T),   z = h Wᵀ + b
    G = dL/dz = T · d loss / d (z / T),   dh = G W,   dW = Gᵀ h,   db = the sum of G over the rows
The logits of a few rows at a time are made, used for the loss and all three gradients in the forward, and dropped. The
backward only scales. T² keeps the gradients' size (Hinton et al., arXiv 1503.02531, section 2).

M rows, V vocabulary, d hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

CHUNK_ELEMENTS = {"cuda": 1 << 24, "cpu": 1 << 22}  # logits of one model in a chunk of rows: 64 and 16 MiB in float32

# Given log q (rows, V), which it may overwrite, which rows these are, and whether the gradient is wanted: the loss
# summed over the rows, and its gradient in z / T (rows, V).
Criterion = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def sum_over_rows(
    hidden: Tensor,  # (M, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    criterion: Criterion,
    temperature: float = 1.0,
) -> Tensor:
    """T² times the criterion's sum over the rows: a float32 scalar (float64 of float64).

    Memory is linear in M and in V. Sums and softmax are float32; on CUDA the products take half-precision inputs, or
    under autocast its dtype, with float32 results. Gradients have the tensors' own dtypes; the criterion's tensors get
    none. Backward may run twice; second derivatives raise `RuntimeError`, forward mode `NotImplementedError`.
    """
    given = [x for x in (hidden, weight, bias) if x is not None]
    if any(unpack_dual(x).tangent is not None for x in given):  # which a detached one would lose
        raise NotImplementedError("a loss of logits in chunks has no forward-mode derivative: use reverse mode")
    if not torch.is_grad_enabled():  # of which a Function's forward is not told
        hidden, weight, bias = detached(hidden, weight, bias)
    result: Tensor = _SumOverRows.apply(hidden, weight, bias, criterion, temperature)  # type: ignore[no-untyped-call]
    return result


def detached(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same without a graph."""
    return hidden.detach(), weight.detach(), None if bias is None else bias.detach()


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, criterion: Criterion, temperature: float
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = Head(hidden, weight, bias, wide)
        total = hidden.new_zeros((), dtype=wide)
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x, dtype=wide) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        step = max(1, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), step):
                rows = slice(start, start + step)
                loss, g = criterion(head.log_softmax(rows, temperature), rows, any(ctx.needs_input_grad))
                total += loss
                if g is None:
                    continue
                g = g.mul_(temperature)
                if d_bias is not None:
                    d_bias += g.sum(0)
                g = g.to(head.weight.dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[rows], g, head.weight)
                if d_weight is not None:
                    _add_product(d_weight, g.mT, head.hidden[rows])
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total.mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "a loss of logits in chunks has first derivatives only: call backward without create_graph"
            )
        gradients = (
            None if gradient is None else (gradient * grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


class Head:
    """Hidden states and output layer in the dtype of their product, whose result is `wide`."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> None:
        dtype = _product_dtype(hidden, wide)
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(wide)
        self.wide = wide

    def log_softmax(self, rows: slice, temperature: float) -> Tensor:
        """(rows, V)."""
        logits = _product(self.hidden[rows], self.weight.mT, self.wide)
        if self.bias is not None:
            logits += self.bias
        return torch.log_softmax(logits.div_(temperature), dim=1)


def _product_dtype(x: Tensor, wide: torch.dtype) -> torch.dtype:
    """Half precision where tensor cores add it up in float32, which elsewhere PyTorch does not offer."""
    if x.device.type != "cuda" or wide == torch.float64:
        return wide
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    return a @ b if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)
