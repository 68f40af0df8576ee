"""Whether the student sees what the teacher sees: their sentence vectors of held-out texts, set beside each other.

A relation loss that falls says nothing of what comes out at the top. So each model's vectors
(`minilm.models.embeddings`) of the same texts are compared by what is done with vectors, similarities and nearest
neighbours:

    correlation   Spearman's, of the cosine similarities of all pairs of texts
    neighbours    the share of a text's ten nearest in the teacher that are among its ten nearest in the student

B batch, N tokens, d hidden size, T texts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from minilm.errors import UsageError
from minilm.models.sentence_modules import SentenceHead

TEXTS = 256  # 32,640 pairs: the correlation to two digits, in seconds
NEIGHBOURS, FEWEST_TEXTS = 10, 3
EXAMPLES, SHOWN_CHARACTERS = 5, 96

Rows = Sequence[dict[str, Any]]  # tokenised texts


class Agreement:
    """A teacher's vectors of up to TEXTS held-out texts, to set those of its student beside.

    Args:
        teacher: a base model.
        rows: the texts, tokenised; the first TEXTS of them are taken.
        collate: makes of some of them the models' inputs, padded, with attention_mask (B, N).
        batch_size: texts in one forward.
        head: makes the teacher's vectors.

    Raises:
        ValueError: fewer than three texts, of which there is no correlation.
    """

    def __init__(
        self, teacher: nn.Module, rows: Rows, collate: Callable[[Rows], Any], batch_size: int, head: SentenceHead
    ) -> None:
        if len(rows) < FEWEST_TEXTS:
            raise UsageError(f"agreement needs {FEWEST_TEXTS} texts, got {len(rows)}")
        self.rows = [rows[index] for index in range(min(TEXTS, len(rows)))]
        self.neighbours = min(NEIGHBOURS, len(self.rows) - 2)  # of all others there would be no choice
        self._by_length = sorted(range(len(self.rows)), key=lambda index: len(self.rows[index]["input_ids"]))
        self._collate, self._batch_size = collate, batch_size
        self._teacher = self.similarities(teacher, head)

    def similarities(self, model: nn.Module, head: SentenceHead) -> Tensor:
        """(T, T) float32 on the CPU: cosines of a base model's vectors, as `head` makes them."""
        device, training = next(model.parameters()).device, model.training
        model.eval()
        head.to(device)
        vectors: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(self.rows), self._batch_size):
                batch = self._collate([self.rows[i] for i in self._by_length[start : start + self._batch_size]])
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                vectors += head(model(**inputs).last_hidden_state, inputs).cpu()
        model.train(training)
        unit = functional.normalize(torch.stack(vectors)[np.argsort(self._by_length)], dim=1)
        return unit @ unit.mT

    def measure(self, student: Tensor) -> dict[str, float]:
        """{"correlation": -1 to 1, "neighbours": 0 to 1} of a student's `similarities` with the teacher's."""
        both = self._teacher, student
        above = np.triu_indices(len(student), k=1)
        ranks = [pd.Series(similarities.numpy()[above]).rank() for similarities in both]
        nearest_t, nearest_s = (_nearest(similarities, self.neighbours) for similarities in both)
        shared = (nearest_t.unsqueeze(2) == nearest_s.unsqueeze(1)).sum() / nearest_t.numel()
        return {"correlation": float(np.corrcoef(ranks)[0, 1]), "neighbours": shared.item()}

    def examples(self, student: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
        """Some short texts, each with its nearest neighbour: {"text", "teacher", "student"}, a line each.

        Of the texts by length the second quarter is taken; the first holds single words.
        """
        nearest_t, nearest_s = (
            _nearest(similarities, 1).flatten().tolist() for similarities in (self._teacher, student)
        )
        quarter = len(self.rows) // 4
        short = sorted(self._by_length[quarter : quarter + max(quarter, EXAMPLES)])
        chosen = short[:: max(1, len(short) // EXAMPLES)][:EXAMPLES]

        def line(index: int) -> str:
            ids = self.rows[index]["input_ids"]
            decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
            text = " ".join(str(decoded).split())
            return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"

        return [{"text": line(i), "teacher": line(nearest_t[i]), "student": line(nearest_s[i])} for i in chosen]


def _nearest(similarities: Tensor, count: int) -> Tensor:
    """(T, count): the texts most similar to each, itself left out."""
    itself = torch.eye(len(similarities), dtype=torch.bool)
    return similarities.masked_fill(itself, -torch.inf).topk(count, dim=1).indices
