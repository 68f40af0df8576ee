"""Everything that computes the loss, side by side: this project, and what a user could write or pick instead.

A provider turns a case into a function (teacher, student, mask) -> scalar loss that PyTorch can differentiate.
B batch, R relation heads, N tokens, d dimension of a relation head, as in `_cases`.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from _attention import attend_by_flash, attend_by_flex, attention_loss, carried_lse, flex_mask
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
    lengths, sides, causal, heads = case.lengths, case.sides, case.causal, case.heads

    def loss(teacher: Triple, student: Triple, mask: Tensor | None) -> Tensor:
        total = torch.zeros((), device=student[0].device)
        for x, y in sides:
            for b, n in enumerate(lengths):
                with torch.no_grad():
                    p = _scores(teacher[x][b, :, :n], teacher[y][b, :, :n], causal).softmax(-1)
                log_q = _scores(student[x][b, :, :n], student[y][b, :, :n], causal).log_softmax(-1)
                total = total + F.kl_div(log_q, p, reduction="sum") / (heads * n)
        return total / len(lengths)

    return loss


def flash(case: Case, device: str) -> Loss:
    """Two calls of PyTorch's flash attention a relation."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return attend_by_flash(query, key, value, scale, case.causal)

    return attention_loss(case, attend, lambda x, y, scale: carried_lse(x, y, scale, attend))


def flex(case: Case, device: str) -> Loss:
    """Two calls of FlexAttention a relation, which takes masks and gives the logsumexp its gradient; compiled."""
    mask = flex_mask(case, device)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return attend_by_flex(query, key, value, scale, mask)

    torch.compiler.reset()
    loss = attention_loss(case, attend, lambda x, y, scale: attend(x, y, y, scale)[1])
    compiled_loss: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return compiled_loss


def liger(case: Case, device: str) -> Loss:
    """Liger Kernel's divergence, of scores and logarithms of their softmax in memory."""
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    sides, causal, n = case.sides, case.causal, case.n

    def log_softmax(x: Tensor, y: Tensor) -> Tensor:
        return _scores(x, y, causal).log_softmax(-1).view(-1, n)

    def loss(teacher: Triple, student: Triple, mask: Tensor | None) -> Tensor:
        total = torch.zeros((), device=student[0].device)
        for x, y in sides:
            with torch.no_grad():
                log_p = log_softmax(teacher[x], teacher[y])
            total = total + divergence(log_softmax(student[x], student[y]), log_p)
        return total

    return loss


def _scores(x: Tensor, y: Tensor, causal: bool) -> Tensor:
    """In float32, of one relation; where causal, without the keys that are later."""
    scores = (x @ y.mT / math.sqrt(x.shape[-1])).float()
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, torch.finfo(scores.dtype).min)


def _flash_refuses(case: Case, device: str) -> str:
    if case.padded:
        return "flash attention takes no padding mask"
    if device == "cuda" and case.dtype == "fp32":
        return "flash attention takes bf16 and fp16"
    if case.d_t + case.d_s > 256:
        return f"flash attention takes head dimensions up to 256, not {case.d_t + case.d_s}"
    return ""


def _flex_refuses(case: Case, device: str) -> str:
    return "" if device == "cuda" else "FlexAttention has no gradients on a CPU"


def _liger_refuses(case: Case, device: str) -> str:
    if device != "cuda":
        return "Liger Kernel runs on a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return "Liger Kernel weighs all rows alike, padding too" if case.padded else ""


PROVIDERS = {
    "fused": Provider(fused),
    "eager": Provider(eager),
    "eager-fp32": Provider(eager, dtype="fp32"),
    "compile": Provider(compiled),
    "flash": Provider(flash, refuses=_flash_refuses),
    "flex": Provider(flex, refuses=_flex_refuses),
    "liger": Provider(liger, refuses=_liger_refuses),
    "loop": Provider(loop),
}
COMPILED = ("compile", "flex")
COMPILE_LENGTHS = (128, 512)  # each length is compiled anew: two a case keep a run within minutes


def default_providers(case: Case, cuda: bool, quick: bool) -> list[str]:
    """All that say something on this device, what is compiled left to two lengths and to runs that may take longer."""
    if not cuda:
        return ["fused", "eager"]
    names = [name for name in PROVIDERS if name != "eager-fp32" or case.dtype != "fp32"]
    return [name for name in names if name not in COMPILED or (case.n in COMPILE_LENGTHS and not quick)]
