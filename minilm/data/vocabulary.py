"""Smaller vocabularies: which tokens a text needs, and a tokenizer that has only these.

A text that the whole tokenizer splits into kept tokens is split into the same ones by the cut tokenizer. WordPiece
(longest match) and Unigram (best score) choose among fewer pieces, the whole tokenizer's choice among them. BPE keeps
with a token all merges that make it and the tokens that these join, down to single letters.

Kept tokens keep their order, so that a padding token with the number 0 keeps it. V tokens of the whole tokenizer.
"""

import copy
import itertools
import json
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from minilm.data.cache import cache_faults
from minilm.data.encoding import encode
from minilm.data.fingerprints import fingerprint_texts
from minilm.data.streams import TextStream
from minilm.data.texts import COLUMNS, Texts
from minilm.errors import UsageError

COUNTED_AT_ONCE, COUNTED_OF_STREAM = 10_000, 100_000  # texts
MODELS = ("WordPiece", "Unigram", "BPE")

Counts = NDArray[np.float64]
Spec = dict[str, Any]  # tokenizer.json


class Vocabulary(NamedTuple):
    """What a cut tokenizer keeps of the whole one."""

    kept: list[int]  # tokens, ascending
    whole: int  # tokens of the whole tokenizer
    share: float  # of the text's tokens that stay what they are
    fingerprint: str  # of the kept tokens' texts


def count_tokens(texts: Texts, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Counts:
    """(V,), how often each token is expected in a text to train on; the counts are cached as `datasets` does."""
    shares = texts.shares or [1.0]
    with cache_faults():
        parts = [_count(train, tokenizer, max_length) / len(train) for train in texts.trains]
    return sum((share * part for share, part in zip(shares, parts, strict=True)), np.zeros(_size(tokenizer)))


def _count(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Counts:
    columns = [name for name in COLUMNS if name in texts.column_names]

    def count(rows: dict[str, list[str]]) -> dict[str, Any]:
        ids = encode(tokenizer, *(rows[name] for name in columns), max_length=max_length)["input_ids"]
        tokens, counts = np.unique(list(itertools.chain(*ids)), return_counts=True)
        return {"token": tokens, "count": counts}

    count(
        {name: ["a"] for name in columns}
    )  # leaves the truncation set: older `datasets` hash it with the tokenizer, for their cache
    counted = texts.map(
        count, batched=True, batch_size=COUNTED_AT_ONCE, remove_columns=columns, desc="counting tokens"
    ).with_format("numpy")
    total = np.zeros(_size(tokenizer))
    np.add.at(total, counted["token"][:], counted["count"][:])
    return total


def count_stream(stream: TextStream) -> Counts:
    """(V,), how often each token stands in a stream's texts without packing: of one pass, or the first 100,000."""
    total = np.zeros(_size(stream.tokenizer))
    for batch in itertools.islice(stream, -(-COUNTED_OF_STREAM // stream.batch_size)):
        total += np.bincount(batch["input_ids"].flatten().numpy(), minlength=len(total))
        if all(position["epoch"] for position in batch["stream_state"]["positions"]):
            break
    return total


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def choose_vocabulary(
    tokenizer: PreTrainedTokenizerBase, counts: Counts, size: int, also: Iterable[int] = ()
) -> Vocabulary:
    """The `size` tokens that are used most, of equally used ones the first, and what must stay beside them.

    That is: special and added tokens; `also`; the letters of ASCII and of all tokens that are used, so that no word of
    the text becomes unknown; of BPE all bytes, and what the merges of kept tokens join.

    Args:
        counts: (V,), how much each token is used.

    Raises:
        ValueError: a tokenizer that cannot be cut; more tokens than are used.
    """
    spec = _spec(tokenizer)
    vocabulary = tokenizer.get_vocab()
    spelling = {token: text for text, token in vocabulary.items()}
    fixed = _fixed(tokenizer, spec, vocabulary) | (spelling.keys() & set(also))
    used = [token for token in np.argsort(-counts, kind="stable").tolist() if counts[token] and token not in fixed]
    if size > len(used):
        raise UsageError(
            f"--student_vocabulary is {size}, and the text to train on uses {len(used)} of the tokenizer's "
            f"{len(spelling)} tokens, special ones left out"
        )
    letters = _letters(spec["model"], (spelling[token] for token in used))
    kept = fixed | set(used[:size]) | {vocabulary[letter] for letter in letters & vocabulary.keys()}
    if spec["model"]["type"] == "BPE":
        needed = _with_ancestors(spec["model"], {spelling[token] for token in kept})
        kept |= {vocabulary[text] for text in needed}
    stays = sum(counts[token] for token in used if token in kept) / counts[used].sum()
    in_order = sorted(kept)
    return Vocabulary(in_order, len(spelling), float(stays), fingerprint_texts(spelling[token] for token in in_order))


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """A copy with only the tokens `kept`, numbered in their order.

    Raises `ValueError` for a tokenizer that cannot be cut.
    """
    spec, new = _spec(tokenizer), {token: number for number, token in enumerate(kept)}
    model = spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for token, piece in enumerate(model["vocab"]) if token in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {text: new[token] for text, token in model["vocab"].items() if token in new}
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if model["vocab"].keys() >= {*pair, _joined(model, *pair)}]
    for added in spec["added_tokens"]:
        added["id"] = new[added["id"]]
    if spec["padding"]:
        spec["padding"]["pad_id"] = new[spec["padding"]["pad_id"]]
    spec["post_processor"] = _renumbered(spec["post_processor"], new.__getitem__)
    cut: Any = copy.deepcopy(tokenizer)
    cut._tokenizer = Tokenizer.from_str(json.dumps(spec))
    wanted = {text: new[token] for text, token in tokenizer.get_vocab().items() if token in new}
    if cut.get_vocab() != wanted:
        raise UsageError(f"the {type(tokenizer).__name__} cannot be cut: its tokens are not numbered in one row")
    return cast(PreTrainedTokenizerBase, cut)


def find_kept(tokenizer: PreTrainedTokenizerBase, cut: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that `cut_tokenizer` has kept of a tokenizer in another one.

    Raises `ValueError` for tokens that are not the whole tokenizer's, or not in its order.
    """
    numbers, own = tokenizer.get_vocab(), cut.get_vocab()
    told = f"the student's tokenizer of {len(own)} tokens is not the teacher's of {len(numbers)} cut"
    if other := min(own.keys() - numbers.keys(), default=None):
        raise UsageError(f"{told}: {other!r} is none of the teacher's")
    for number, text in enumerate(sorted(own, key=numbers.__getitem__)):
        if own[text] != number:
            raise UsageError(f"{told}: {text!r} is its token {own[text]}, and would be {number}")
    return sorted(numbers[text] for text in own)


def _spec(tokenizer: PreTrainedTokenizerBase) -> Spec:
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise UsageError(f"the {name} cannot be cut to --student_vocabulary: it has no tokenizer.json")
    spec: Spec = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    if (kind := spec["model"]["type"]) not in MODELS:
        raise UsageError(f"the {name} cannot be cut to --student_vocabulary: {kind} is none of {', '.join(MODELS)}")
    return spec


def _fixed(tokenizer: PreTrainedTokenizerBase, spec: Spec, vocabulary: Mapping[str, int]) -> set[int]:
    """What stays though no text uses it: special and added tokens, bytes, and what unknown letters are told by."""
    model = spec["model"]
    fixed = {added["id"] for added in spec["added_tokens"]} | set(tokenizer.all_special_ids)
    fixed |= set(_numbers(spec["post_processor"]))
    texts = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    if model["type"] == "BPE":
        texts |= _forms(model, pre_tokenizers.ByteLevel.alphabet())
    if model["type"] == "Unigram":  # an unknown letter costs ten more than the piece with the least score
        scores = [score for _, score in model["vocab"]]
        fixed |= {scores.index(min(scores))} | {token for token in [model["unk_id"]] if token is not None}
    elif model["unk_token"] is not None:
        texts.add(model["unk_token"])
    return fixed | {vocabulary[text] for text in texts & vocabulary.keys()}


def _letters(model: Spec, tokens: Iterable[str]) -> set[str]:
    """The letters of ASCII and the tokens in all their forms: inside a word WordPiece writes them with "##"."""
    prefix, suffix = _marks(model)
    words = (text.removeprefix(prefix).removesuffix(suffix) for text in tokens)
    return _forms(model, itertools.chain(string.printable, *words))


def _forms(model: Spec, letters: Iterable[str]) -> set[str]:
    prefix, suffix = _marks(model)
    return {f"{before}{letter}{after}" for letter in letters for before in ("", prefix) for after in ("", suffix)}


def _marks(model: Spec) -> tuple[str, str]:
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _joined(model: Spec, left: str, right: str) -> str:
    return left + right.removeprefix(_marks(model)[0])


def _with_ancestors(model: Spec, tokens: set[str]) -> set[str]:
    """The tokens and, by every merge that makes one of them, what it joins."""
    joined: dict[str, list[str]] = defaultdict(list)
    for left, right in model["merges"]:
        joined[_joined(model, left, right)] += [left, right]
    needed, new = set(tokens), list(tokens)
    while new:
        parents = [part for part in joined[new.pop()] if part not in needed]
        needed.update(parents)
        new += parents
    return needed


def _numbers(processor: Any) -> list[int]:
    """The tokens that a post-processor names."""
    found: list[int] = []

    def note(token: int) -> int:
        found.append(token)
        return token

    _renumbered(processor, note)
    return found


def _renumbered(processor: Any, number: Callable[[int], int]) -> Any:
    """A post-processor with other numbers of tokens, which stand in {"ids": [...]} or in {"sep": [text, ...]}."""
    if isinstance(processor, list):
        return [_renumbered(part, number) for part in processor]
    if not isinstance(processor, dict):
        return processor
    renumbered = {name: _renumbered(value, number) for name, value in processor.items()}
    if "ids" in renumbered:
        renumbered["ids"] = [number(token) for token in renumbered["ids"]]
    for name in ("sep", "cls"):
        if name in renumbered:
            text, token = renumbered[name]
            renumbered[name] = [text, number(token)]
    return renumbered
