"""How a model is fine-tuned on a task."""

from dataclasses import dataclass

from minilm.evaluation.tasks import Form


@dataclass(frozen=True)
class Settings:
    """One fine-tuning; the defaults are the papers' where these have one value.

    Attributes:
        learning_rate: of AdamW, after a warm-up over the first 10 % of the steps; it then falls linearly to 0.
        epochs: how often all training records are seen.
        seed: of the new head, of dropout, of the records' order and of which of them are taken.
        batch_size: records in a step.
        max_length: tokens of a text or pair, special ones among them; None for what `length` says.
        max_train_records: that are taken of the training split; None for all.
        bf16: whether matrix products are computed in bfloat16; the weights stay in float32.
        use_cpu: whether a GPU is left alone.
    """

    learning_rate: float = 5e-5
    epochs: int = 3
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    max_train_records: int | None = None
    bf16: bool = False
    use_cpu: bool = False

    def length(self, form: Form) -> int:
        """`max_length`, or the papers': 384 where answers are looked for in documents, else 128."""
        return self.max_length or (384 if form == "answers" else 128)
