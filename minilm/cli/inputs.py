"""What a run trains on: texts or images, indexed or streamed, packed or padded, with their collator."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from transformers import (
    BaseImageProcessor,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minilm.cli.arguments import Arguments
from minilm.cli.demo import docstrings
from minilm.cli.flags import DataArguments
from minilm.data.fingerprints import fingerprint_texts
from minilm.data.images import find_images, load_images, stack_images
from minilm.data.packing import PackingCollator, pack
from minilm.data.streams import TextStream
from minilm.data.texts import Found, Texts, find_sources, fingerprint_source, split_heldout, split_texts, tokenize
from minilm.data.vocabulary import Vocabulary, choose_vocabulary, count_stream, count_tokens, cut_tokenizer
from minilm.errors import UsageError
from minilm.models.teachers import resolve_length

Processor = PreTrainedTokenizerBase | BaseImageProcessor
# Of a stream that is counted: the same texts however many processes will train.
_ONE_READER = {"batch_size": 1000, "packing": False, "rank": 0, "world_size": 1, "num_workers": 0}
Collator = Callable[[list[dict[str, Any]]], Any]


@dataclass
class Inputs:
    """Data sets with their collator, and what a report says of them.

    `fingerprint` tells the data by their content: the same wherever they lie, another where they changed. `vocabulary`
    is what --student_vocabulary keeps of the teacher's: the numbers of the tokens are then those of its own.
    """

    train: datasets.Dataset | TextStream
    heldout: datasets.Dataset
    collator: Collator
    description: dict[str, Any]
    fingerprint: str
    vocabulary: Vocabulary | None


def load_inputs(arguments: Arguments, teacher: PreTrainedModel, processor: Processor, named: Iterable[int]) -> Inputs:
    """Everything that stands under --data, in the teacher's inputs, or the smaller vocabulary's.

    Args:
        named: tokens that a smaller vocabulary keeps, because the teacher knows them by number.

    Raises:
        ValueError: nothing there, no such column, flags that do not go together.
    """
    own = docstrings() if arguments.demo else []
    found: Found = {}
    vocabulary = None
    if not isinstance(processor, PreTrainedTokenizerBase):
        _check_image_flags(arguments)
        found = {source: find_images(source) for source in arguments.data.data or []}
        (train, heldout), copies, bad, max_length = _images(arguments.data, processor, found), 0, 0, None
        collator: Collator = stack_images
    else:
        pairs = arguments.data.text_pair_column is not None
        max_length = resolve_length(teacher, processor, arguments.data.max_length, pairs=pairs)
        found = find_sources(arguments.data.data or [])
        (train, heldout, copies), tokenizer, vocabulary, bad = _texts(
            arguments, own, processor, max_length, found, named
        )
        collator = _PackedOrPadded(tokenizer, max_length)
    packing = arguments.data.packing
    sequences = None if isinstance(train, TextStream) else len(train)
    if packing and not isinstance(train, TextStream):
        assert max_length is not None
        train = pack(train, max_length)
    description: dict[str, Any] = {
        "name": "the standard library's docstrings" if arguments.demo else ", ".join(arguments.data.data or []),
        "unit": "images" if max_length is None else "sequences",
        "train_sequences": sequences,
        "heldout_sequences": len(heldout),
        "max_length": max_length,
        "packed": packing,
    }
    if vocabulary:
        description["vocabulary"] = {"kept": len(vocabulary.kept), "of": vocabulary.whole, "share": vocabulary.share}
    if copies:
        description["copies_left_out"] = copies
    if bad:
        description["bad_records"] = bad
    if files := {source: str(chosen) for source, chosen in found.items() if chosen and Path(source).is_dir()}:
        description["files"] = files  # of each folder what was read and left out
    fingerprint = fingerprint_texts(own) if arguments.demo else _fingerprint(arguments.data, found)
    return Inputs(train, heldout, collator, description, fingerprint, vocabulary)


def _fingerprint(data: DataArguments, found: Found) -> str:
    assert data.data is not None
    parts = [fingerprint_source(source, found[source], data.data_config) for source in data.data]
    return parts[0] if len(parts) == 1 else fingerprint_texts(parts)


class _Tokenised(NamedTuple):
    splits: tuple[datasets.Dataset | TextStream, datasets.Dataset, int]  # to train on, held out, copies left out
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary | None
    bad_records: int = 0


def _texts(
    arguments: Arguments,
    own: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    found: Found,
    named: Iterable[int],
) -> _Tokenised:
    """Sequences to train on and held out, by the teacher's tokenizer or what --student_vocabulary leaves of it."""
    size, vocabulary = arguments.model.student_vocabulary, None
    if (pair := arguments.data.text_pair_column) is not None:
        if arguments.data.streaming:
            raise UsageError(f"--text_pair_column {pair} is not read from a stream: leave out --streaming")
        if arguments.data.packing:  # whose rows do not say of which text of a pair a token is
            raise UsageError(f"--text_pair_column {pair} does not go with --packing: leave one of them out")
    texts = None if arguments.data.streaming else _indexed(arguments.data, own, found)
    if size is not None:
        if texts:
            counts = count_tokens(texts, tokenizer, max_length)
        else:
            counts = count_stream(_stream(arguments, tokenizer, max_length, found, **_ONE_READER))
        vocabulary = choose_vocabulary(tokenizer, counts, size, named)
        tokenizer = cut_tokenizer(tokenizer, vocabulary.kept)
    if texts:
        return _Tokenised(texts.tokenize(tokenizer, max_length), tokenizer, vocabulary, texts.bad_records)
    stream = _stream(arguments, tokenizer, max_length, found)
    return _Tokenised((stream, tokenize(stream.heldout, tokenizer, max_length), 0), tokenizer, vocabulary)


def _indexed(data: DataArguments, own: list[str], found: Found) -> Texts:
    """`own` are the demonstration's texts, all distinct."""
    if own:
        train, heldout = split_heldout(datasets.Dataset.from_dict({"text": own}))
        return Texts([train], heldout)
    assert data.data is not None
    return split_texts(
        data.data,
        config=data.data_config,
        text_column=data.text_column,
        pair_column=data.text_pair_column,
        weights=data.data_weights,
        found=found,
        on_bad_record=data.on_bad_record,
    )


def _stream(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, max_length: int, found: Found, **other: Any
) -> TextStream:
    """This process's texts, or with `other` settings other ones."""
    data, training = arguments.data, arguments.training
    assert data.data is not None
    settings: dict[str, Any] = {
        "batch_size": training.train_batch_size,
        "packing": data.packing,
        "rank": training.process_index,
        "world_size": training.world_size,
        "num_workers": training.dataloader_num_workers,
    }
    return TextStream(
        data.data,
        tokenizer,
        max_length=max_length,
        shuffle_buffer=data.shuffle_buffer,
        seed=training.seed if training.data_seed is None else training.data_seed,
        config=data.data_config,
        text_column=data.text_column,
        weights=data.data_weights,
        found=found,
        on_bad_record=data.on_bad_record,
        **{**settings, **other},
    )


def _check_image_flags(arguments: Arguments) -> None:
    flags = {"student_vocabulary": arguments.model.student_vocabulary, **vars(arguments.data)}
    for flag in ("streaming", "packing", "data_weights", "max_length", "text_pair_column", "student_vocabulary"):
        if flags[flag]:
            raise UsageError(f"--{flag} is for texts, and the teacher takes images")
    if arguments.data.on_bad_record != "stop":
        raise UsageError(f"--on_bad_record {arguments.data.on_bad_record} is for texts, and the teacher takes images")


def _images(
    data: DataArguments, processor: BaseImageProcessor, found: Found
) -> tuple[datasets.Dataset, datasets.Dataset]:
    assert data.data is not None
    return load_images(data.data, processor, config=data.data_config, image_column=data.image_column, found=found)


class _PackedOrPadded:
    """Packed rows to train on; what is held out is padded. No closure, which workers that are not forked cannot get."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._packed = PackingCollator(tokenizer.pad_token_id, max_length)
        self._padded = DataCollatorWithPadding(tokenizer)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        return self._packed(features) if "lengths" in features[0] else self._padded(features)
