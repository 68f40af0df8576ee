"""MiniLM's relation losses as tensors in, tensors out: Triton kernels, a plain PyTorch path, and the reference."""

from minilm_kernels._loss import fused_minilm_loss, relation_kl
from minilm_kernels._reference import reference_rows

__all__ = ["fused_minilm_loss", "reference_rows", "relation_kl"]
