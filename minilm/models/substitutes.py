"""Which words may take a word's place, by a masked LM or by the neighbours of its vector (TinyBERT, section 3.2).

B batch, N tokens, V vocabulary, d width of the vectors.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.errors import UsageError
from minilm.models.heads import TokenOutput, run_up_to_output


class Place(NamedTuple):
    """A word in a text, and what may stand there instead."""

    start: int
    end: int
    words: list[str]


class _Masked(NamedTuple):
    """A text with one token to mask, the word there, and the list that its substitutes go to."""

    ids: list[int]
    token: int
    word: str
    words: list[str]


class Substitutes:
    """For the words of texts: those that may take their places.

    A word that is one token is masked, in a copy of its text for each such word, and the masked LM's most probable
    words are taken. A word of several tokens gets the words of the nearest vectors (cosine): of the model's embeddings,
    of its tokens their mean; or of `vectors`, where a word that has none keeps its place. Words without a letter or
    a digit, and those beyond `max_length` tokens, keep theirs too. No word is among its own substitutes.

    Args:
        model: a masked LM, in eval mode.
        count: of the substitutes of a word (the paper's K).
        vectors: words and their vectors (words, d), instead of the model's embeddings.
        batch_size: masked texts in one forward.

    Raises:
        ValueError: a tokenizer without a mask token, or one that does not tell where words stand in a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        count: int = 15,
        vectors: tuple[list[str], Tensor] | None = None,
        max_length: int = 512,
        batch_size: int = 64,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise UsageError(f"the {type(tokenizer).__name__} has no mask token: a masked LM's teacher has one")
        if not tokenizer.is_fast:
            raise UsageError(f"the {type(tokenizer).__name__} does not tell where words stand: take a fast tokenizer")
        self._model, self._tokenizer, self._count = model, tokenizer, count
        self._max_length, self._batch_size = max_length, batch_size
        self._embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight.detach()
        self._words = _words_of(tokenizer, len(self._embeddings))
        self._tokens = {word: token for token, word in enumerate(self._words) if word is not None}
        self._is_word = torch.tensor([word is not None for word in self._words], device=model.device)
        self._by_tokens = vectors is None
        if vectors is None:
            self._names, table = [word for word in self._words if word is not None], self._embeddings[self._is_word]
        else:
            self._names, table = vectors
        self._places = {name: place for place, name in enumerate(self._names)}
        self._table = functional.normalize(table.to(model.device), dim=1)
        self._nearest: dict[str, list[str]] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[list[Place]]:
        """Of each text the words that have substitutes, in order."""
        read = self._tokenizer(list(texts), truncation=True, max_length=self._max_length, return_offsets_mapping=True)
        places: list[list[Place]] = []
        masked: list[_Masked] = []
        for number, text in enumerate(texts):
            ids, offsets = read["input_ids"][number], read["offset_mapping"][number]
            words: dict[int, list[int]] = {}
            for token, place_in_text in enumerate(read.word_ids(number)):
                if place_in_text is not None:
                    words.setdefault(place_in_text, []).append(token)
            places.append([])
            for tokens in words.values():
                start, end = offsets[tokens[0]][0], offsets[tokens[-1]][1]
                of_word = [at for at in range(start, end) if text[at].isalnum()]
                if not of_word:
                    continue
                place = Place(of_word[0], of_word[-1] + 1, [])  # without blanks and signs that the tokenizer adds
                places[-1].append(place)
                word = text[place.start : place.end]
                tokens = [
                    token for token in tokens if offsets[token][0] < place.end and offsets[token][1] > place.start
                ]
                if len(tokens) == 1:
                    masked.append(_Masked(ids, tokens[0], word, place.words))
                else:
                    place.words.extend(self._neighbours(word, [ids[token] for token in tokens]))
        masked.sort(key=lambda entry: len(entry.ids))
        for first in range(0, len(masked), self._batch_size):
            self._predict(masked[first : first + self._batch_size])
        return [[place for place in of_text if place.words] for of_text in places]

    def _predict(self, masked: list[_Masked]) -> None:
        mask = cast(int, self._tokenizer.mask_token_id)
        rows = [{"input_ids": [*x.ids[: x.token], mask, *x.ids[x.token + 1 :]]} for x in masked]
        device = self._model.device
        inputs = {name: x.to(device) for name, x in self._tokenizer.pad(rows, return_tensors="pt").items()}
        output = cast(TokenOutput, run_up_to_output(self._model, inputs))
        place = torch.tensor([entry.token for entry in masked], device=device)
        row = torch.arange(len(masked), device=device)
        scores = functional.linear(output.hidden[row, place], output.weight, output.bias)  # (B, V)
        allowed = self._is_word[: scores.shape[1]].expand_as(scores).clone()
        for number, entry in enumerate(masked):
            allowed[number, [self._tokens[name] for name in _spellings(entry.word) & self._tokens.keys()]] = False
        for entry, best in zip(masked, self._best(scores.masked_fill(~allowed, -torch.inf)), strict=True):
            entry.words.extend(cast(str, self._words[token]) for token in best)

    def _neighbours(self, word: str, ids: list[int]) -> list[str]:
        if word not in self._nearest:
            self._nearest[word] = []
            vector = self._vector(word, ids)
            if vector is not None:
                scores = self._table @ functional.normalize(vector, dim=0)
                for name in _spellings(word) & self._places.keys():
                    scores[self._places[name]] = -torch.inf
                self._nearest[word] = [self._names[place] for place in self._best(scores[None])[0]]
        return self._nearest[word]

    def _vector(self, word: str, ids: list[int]) -> Tensor | None:
        if self._by_tokens:
            return self._embeddings[ids].mean(0)
        place = self._places.get(word, self._places.get(word.lower()))
        return None if place is None else self._table[place]

    def _best(self, scores: Tensor) -> list[list[int]]:
        """By row the places of the highest scores, those of minus infinity left out."""
        values, places = scores.topk(min(self._count, scores.shape[1]))
        return [row[finite].tolist() for row, finite in zip(places, values.isfinite(), strict=True)]


def _spellings(word: str) -> set[str]:
    return {word, word.lower()}


def _words_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str | None]:
    """By token the word that the tokenizer reads as that token alone; None for pieces, signs and special tokens."""
    special = set(tokenizer.all_special_ids)
    tokens = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    texts = [tokenizer.convert_tokens_to_string([token]).strip() for token in tokens]
    read = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    words: list[str | None] = [
        text if ids == [token] and token not in special and any(map(str.isalnum, text)) else None
        for token, (text, ids) in enumerate(zip(texts, read, strict=True))
    ]
    return words + [None] * (rows - len(words))
