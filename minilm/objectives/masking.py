"""Masked tokens (BERT, section 3.1), chosen by (seed, step, the row's tokens, position) and by nothing else.

So a text is masked anew in every step, and alike on whatever rank, in whatever micro-batch and after whatever
interruption it comes: transformers' collator draws from generators that a resumed run does not find as they were.

B batch, N tokens, V vocabulary.
"""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minilm.errors import UsageError
from minilm.models.batches import NO_LABEL, Batch, token_mask

HELD_OUT = -1  # the step of an evaluation: the same masks each time
MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are
CONTINUES, BEGINS = "##", ("\u0120", "\u2581")  # of WordPiece; of byte-level BPE and SentencePiece


class Masking:
    """Chooses tokens, puts masks or other tokens in the place of most of them, and keeps them as labels.

    Args:
        tokenizer: of both models.
        probability: of a token, or of a word, to be chosen.
        whole_words: whether all tokens of a word are chosen together.
        seed: of the run.

    Raises:
        ValueError: a tokenizer without a mask token; with `whole_words`, one whose tokens do not tell where words
            begin; a probability that is not between 0 and 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        probability: float = 0.15,
        whole_words: bool = False,
        seed: int = 0,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise UsageError(f"the {type(tokenizer).__name__} has no mask token: a masked LM's teacher has one")
        if not 0 < probability < 1:
            raise UsageError(f"mlm_probability is {probability}: it must lie between 0 and 1")
        self.mask_token: int = tokenizer.mask_token_id
        self.probability, self.seed = probability, seed
        self._special = torch.zeros(len(tokenizer), dtype=torch.bool)
        self._special[tokenizer.all_special_ids] = True
        self._begins = _word_begins(tokenizer) if whole_words else None

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The batch with masked `input_ids` and `labels` (B, N), which are -100 where nothing was chosen."""
        ids, present = batch["input_ids"], token_mask(batch)
        self._special = self._special.to(ids.device)  # where it stays: a copy in each step would wait
        special = self._special[ids]
        place = torch.arange(ids.shape[1], device=ids.device)
        token = torch.ones_like(special) if present is None else present.bool()
        key = _mix((_mix(ids + (place << 32)) * token).sum(1, keepdim=True) + _mix(place.new_tensor(self._salt(step))))
        unit = place.expand_as(ids)
        if self._begins is not None:
            after_special = torch.nn.functional.pad(special[:, :-1], (1, 0))
            self._begins = self._begins.to(ids.device)
            unit = (self._begins[ids] | after_special).cumsum(1)
        chosen = (_uniform(key, unit, 1) < self.probability) & token & ~special
        what = _uniform(key, place, 2)
        other = (_uniform(key, place, 3) * len(self._special)).long()
        masked = torch.where(what < MASKED, self.mask_token, torch.where(what < MASKED + RANDOM, other, ids))
        return {
            **batch,
            "input_ids": torch.where(chosen, masked, ids),
            "labels": torch.where(chosen, ids, NO_LABEL),
        }

    def _salt(self, step: int) -> int:
        return (self.seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF_FFFF


def _word_begins(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) bool: which tokens begin a word, as their spelling says."""
    tokens = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    continues, begins = ([token.startswith(mark) for token in tokens] for mark in (CONTINUES, BEGINS))
    if sum(continues) > sum(begins):  # BPE may have a token "##" too
        return ~torch.tensor(continues)
    if not any(begins):
        raise UsageError(
            f"the tokens of the {type(tokenizer).__name__} do not tell where words begin: leave out "
            "--whole_word_masking"
        )
    return torch.tensor(begins)


def _uniform(key: Tensor, place: Tensor, draw: int) -> Tensor:
    """(B, N) float32 in [0, 1), by row and place: 24 bits, which it holds."""
    return ((_mix(key + _mix(place * 4 + draw)) >> 40) & ((1 << 24) - 1)).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 that wraps (Steele, Lea and Flood, 2014): neighbours become unlike."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))
