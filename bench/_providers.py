"""Everything that computes the loss, side by side: this project, and what a user could write or pick instead.

A provider turns a case into a function (teacher, student, mask) -> scalar loss that PyTorch can differentiate.
B batch, R relation heads, N tokens, d dimension of a relation head, as in `_cases`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from _cases import Case, Triple
from torch import Tensor
from torch.nn import functional as F

from minilm import fused_minilm_loss

Loss = Callable[[Triple, Triple, Tensor | None], Tensor]


class Provider(NamedTuple):
    make: Callable[[Case, str], Loss]  # of case and device
    dtype: str | None = None  # the inputs are converted to it beforehand
    refuses: Callable[[Case, str], str] = lambda case, device: ""  # why it does not run, or ""


def fused(case: Case, device: str) -> Loss:
    """This project: the Triton kernels on CUDA, the chunked path on a CPU."""
    return _library(case, "triton" if device == "cuda" else "chunked")


def eager(case: Case, device: str) -> Loss:
    """The formula in PyTorch, batched, every N×N matrix in memory."""
    return _library(case, "reference")


def compiled(case: Case, device: str) -> Loss:
    """torch.compile of eager."""
    torch.compiler.reset()  # else a second length would be compiled for every length
    compiled_loss: Loss = torch.compile(_library(case, "reference"), fullgraph=True, dynamic=False)
    return compiled_loss


def _library(case: Case, implementation: str) -> Loss:
    relations, causal = case.relations, case.causal

    def loss(teacher: Triple, student: Triple, mask: Tensor | None) -> Tensor:
        return fused_minilm_loss(
            teacher, student, relations, attention_mask=mask, causal=causal, implementation=implementation
        )

    return loss


def loop(case: Case, device: str) -> Loss:
    """One sequence after the other, cut to its length, as the closest peer (bloomberg/minilmv2.bb) writes it.

    The lengths are known on the host here, which spares it a synchronisation for each sequence.
    """
    lengths, relations, causal, heads = case.lengths, case.relations, case.causal, case.heads

    def scores(x: Tensor, y: Tensor) -> Tensor:
        scores = (x @ y.mT / math.sqrt(x.shape[-1])).float()
        if not causal:
            return scores
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(later, torch.finfo(scores.dtype).min)

    def loss(teacher: Triple, student: Triple, mask: Tensor | None) -> Tensor:
        total = torch.zeros((), device=student[0].device)
        for relation in relations:
            x, y = ("qkv".index(letter) for letter in relation)
            for b, n in enumerate(lengths):
                with torch.no_grad():
                    p = scores(teacher[x][b, :, :n], teacher[y][b, :, :n]).softmax(-1)
                log_q = scores(student[x][b, :, :n], student[y][b, :, :n]).log_softmax(-1)
                total = total + F.kl_div(log_q, p, reduction="sum") / (heads * n)
        return total / len(lengths)

    return loss


def flash(case: Case, device: str) -> Loss:
    """Two calls of PyTorch's flash attention a relation, with values [Y_T | Y_S] for the teacher:

    KL_i = scale_T x_T·O_TT − scale_S x_S·O_TS − lse_T + lse_S
    """
    relations, causal = case.relations, case.causal
    scale_t, scale_s = 1 / math.sqrt(case.d_t), 1 / math.sqrt(case.d_s)

    def rows(x_t: Tensor, y_t: Tensor, x_s: Tensor, y_s: Tensor) -> Tensor:
        o_t, lse_t = _attention(x_t, y_t, torch.cat([y_t, y_s], -1), scale_t, causal)
        o_tt, o_ts = o_t.split([y_t.shape[-1], y_s.shape[-1]], -1)
        # The kernel gives lse_S no gradient. It is scale (Q Y) for x and scale (Qᵀ X) for y: that of this product with
        # the attention's query and key held constant, whose value is taken away again.
        o_s, lse_s = _attention(x_s.detach(), y_s.detach(), y_s, scale_s, causal)
        carrier = scale_s * (_dot(x_s, o_s.detach()) + _dot(x_s.detach(), o_s))
        lse_s = lse_s + carrier - carrier.detach()
        return scale_t * _dot(x_t, o_tt) - scale_s * _dot(x_s, o_ts) - lse_t + lse_s

    def loss(teacher: Triple, student: Triple, mask: Tensor | None) -> Tensor:
        index = [tuple("qkv".index(letter) for letter in relation) for relation in relations]
        return torch.stack([rows(teacher[x], teacher[y], student[x], student[y]).mean() for x, y in index]).sum()

    return loss


def _dot(x: Tensor, y: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(x.float(), y.float())
    return products


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output (B, R, N, d of value) and natural logsumexp (B, R, N) of flash attention."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    if not query.is_cuda:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # It wants one head dimension for all three, a multiple of 8: zeros change neither scores nor outputs.
    width = value.shape[-1]
    dim = -(-max(query.shape[-1], width) // 8) * 8
    query, key, value = (F.pad(x, (0, dim - x.shape[-1])) for x in (query, key, value))
    output, lse = kernel(query, key, value, 0.0, causal, scale=scale)[:2]
    return output[..., :width], lse


def _flash_refuses(case: Case, device: str) -> str:
    if case.padded:
        return "flash attention takes no padding mask"
    if device == "cuda" and case.dtype == "fp32":
        return "flash attention takes bf16 and fp16"
    if case.d_t + case.d_s > 256:
        return f"flash attention takes head dimensions up to 256, not {case.d_t + case.d_s}"
    return ""


PROVIDERS = {
    "fused": Provider(fused),
    "eager": Provider(eager),
    "eager-fp32": Provider(eager, dtype="fp32"),
    "compile": Provider(compiled),
    "flash": Provider(flash, refuses=_flash_refuses),
    "loop": Provider(loop),
}
COMPILE_LENGTHS = (128, 512)  # each length is compiled anew: two a case keep a run within minutes


def default_providers(case: Case, cuda: bool, quick: bool) -> list[str]:
    """All that say something on this device, `compile` left to two lengths and to runs that may take longer."""
    if not cuda:
        return ["fused", "eager"]
    names = [name for name in PROVIDERS if name != "eager-fp32" or case.dtype != "fp32"]
    return [name for name in names if name != "compile" or (case.n in COMPILE_LENGTHS and not quick)]
