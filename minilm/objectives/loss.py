"""The loss as a module: the options of `fused_minilm_loss`, and each relation's value beside the sum."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from minilm_kernels._checks import relation_weights
from minilm_kernels._loss import Scale, Triple, minilm_losses


class MiniLMLoss(nn.Module):
    """`fused_minilm_loss` with its options held: MiniLM (eq. 10) by default.

    Args: as in `fused_minilm_loss`; they are checked when the loss is called, `relations` at once.

    >>> import torch
    >>> q = torch.eye(2).reshape(1, 1, 2, 2)
    >>> MiniLMLoss()((q, q, q), (q, q, 3 * q))
    (tensor(1.4690), {'qk': tensor(0.), 'vv': tensor(1.4690)})
    """

    def __init__(
        self,
        relations: Sequence[str] | Mapping[str, float] = ("qk", "vv"),
        relation_heads: int | None = None,
        causal: bool = False,
        temperature: float = 1.0,
        scale: Scale = None,
        reduction: str = "sequence",
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.relations = relation_weights(relations)
        self.relation_heads = relation_heads
        self.causal = causal
        self.temperature = temperature
        self.scale = scale
        self.reduction = reduction
        self.implementation = implementation

    def forward(
        self,
        teacher: Triple,  # (q, k, v), each (B, H_t, N, D_t)
        student: Triple,  # (q, k, v), each (B, H_s, N, D_s)
        attention_mask: Tensor | None = None,  # (B, N)
        prefix_lengths: Tensor | None = None,  # (B,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and {relation: its unweighted loss, detached}."""
        total, (parts,) = self.of_layers([teacher], [student], attention_mask, prefix_lengths, cu_seqlens)
        return total, parts

    def of_layers(
        self,
        teacher: Sequence[Triple],
        student: Sequence[Triple],
        attention_mask: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The weighted sum over pairs of layers, in as few launches as of one, and the losses of each pair."""
        return minilm_losses(
            teacher,
            student,
            self.relations,
            self.relation_heads,
            attention_mask,
            self.causal,
            prefix_lengths,
            cu_seqlens,
            self.temperature,
            self.scale,
            self.reduction,
            self.implementation,
        )

    def extra_repr(self) -> str:
        return f"relations={self.relations}, relation_heads={self.relation_heads}, reduction={self.reduction!r}"
