"""The masked LM's own loss (BERT, section 3.1, task 1): cross-entropy of the words that were masked.

    L_MLM = -log q_y,   q = softmax(z),   d L_MLM / d z = q − onehot(y)
Only rows that have a label are looked at, and their logits are made a few rows at a time (`minilm.objectives.chunks`).

B batch, N tokens, M rows with labels, V vocabulary, d hidden size.
"""

from torch import Tensor
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.batches import NO_LABEL, Batch, labels_of
from minilm.models.heads import TokenOutput, has_vocabulary_head
from minilm.models.observe import Needs, Observed
from minilm.models.probes import is_causal
from minilm.objectives.chunks import sum_over_rows
from minilm.objectives.term import Term, Unit


class MaskedLM(Term):
    """Cross-entropy of the student's masked-LM head as the part "mlm": the mean over the tokens that have labels.

    Args:
        weight: of the part in the loss.

    Raises (from `forward`):
        ValueError: a student that is a classifier; labels of another size than the tokens.
    """

    unit: Unit = "labels"
    student = Needs(output=True)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.parts = {"mlm": weight}

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output, labels = student.output, labels_of(batch)
        if not isinstance(output, TokenOutput):
            raise UsageError(f"the student gives a {type(output).__name__}, and masked tokens need a TokenOutput")
        if labels.shape != output.hidden.shape[:2]:
            raise UsageError(f"labels are {tuple(labels.shape)}, (batch, tokens) is {tuple(output.hidden.shape[:2])}")
        index = (labels != NO_LABEL).flatten().nonzero().squeeze(1)
        hidden = output.hidden.flatten(0, 1).index_select(0, index)
        total = label_cross_entropy(hidden, output.weight, output.bias, labels.flatten()[index])
        mean = total / max(1, len(index))
        return self.parts["mlm"] * mean, {"mlm": mean.detach()}


def label_cross_entropy(
    hidden: Tensor,  # (M, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,) int64, 0 to V - 1
) -> Tensor:
    """-log softmax(hidden @ weight.T + bias) at the labels in nats, summed over the rows, as `sum_over_rows` sums."""

    def cross_entropy(log_q: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        chosen = labels[rows, None]
        total = -log_q.gather(1, chosen).sum()
        if not with_gradient:
            return total, None
        q = log_q.exp_()
        return total, q.scatter_(1, chosen, q.gather(1, chosen) - 1)

    return sum_over_rows(hidden, weight, bias, cross_entropy)


def check_masked_lm(teacher: PreTrainedModel) -> None:
    """Raises `ValueError` for a teacher that is no masked LM."""
    if not has_vocabulary_head(teacher):
        kind = "classifies"
    elif is_causal(teacher):
        kind = "predicts the next token"
    else:
        return
    raise UsageError(f"the teacher is a {type(teacher).__name__}, which {kind}: masked tokens need a masked LM")
