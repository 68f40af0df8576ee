"""What a run trains on: texts or images, indexed or streamed, packed or padded, with their collator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    BaseImageProcessor,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from minilm.cli.arguments import Arguments
from minilm.cli.demo import docstrings
from minilm.cli.flags import DataArguments
from minilm.data.fingerprints import fingerprint_texts
from minilm.data.images import find_images, load_images, stack_images
from minilm.data.packing import PackingCollator, pack
from minilm.data.streams import TextStream
from minilm.data.texts import Found, find_sources, fingerprint_source, load_splits, split_heldout, tokenize
from minilm.errors import UsageError
from minilm.models.teachers import resolve_length

Processor = PreTrainedTokenizerBase | BaseImageProcessor
Collator = Callable[[list[dict[str, Any]]], Any]


@dataclass
class Inputs:
    """Data sets with their collator, and what a report says of them.

    `fingerprint` tells the data by their content: the same wherever they lie, another where they changed.
    """

    train: datasets.Dataset | TextStream
    heldout: datasets.Dataset
    collator: Collator
    description: dict[str, Any]
    fingerprint: str


def load_inputs(arguments: Arguments, teacher: PreTrainedModel, processor: Processor) -> Inputs:
    """Everything that stands under --data, in the teacher's inputs.

    Raises:
        ValueError: nothing there, no such column, flags that do not go together.
    """
    own = docstrings() if arguments.demo else []
    found: Found = {}
    if not isinstance(processor, PreTrainedTokenizerBase):
        _check_image_flags(arguments.data)
        found = {source: find_images(source) for source in arguments.data.data or []}
        (train, heldout), copies, max_length = _images(arguments.data, processor, found), 0, None
        collator: Collator = stack_images
    else:
        max_length = resolve_length(teacher, processor, arguments.data.max_length)
        found = find_sources(arguments.data.data or [])
        train, heldout, copies = _texts(arguments, own, processor, max_length, found)
        collator = _collator(processor, max_length)
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
    if copies:
        description["copies_left_out"] = copies
    if files := {source: str(chosen) for source, chosen in found.items() if chosen and Path(source).is_dir()}:
        description["files"] = files  # of each folder what was read and left out
    fingerprint = fingerprint_texts(own) if arguments.demo else _fingerprint(arguments.data, found)
    return Inputs(train, heldout, collator, description, fingerprint)


def _fingerprint(data: DataArguments, found: Found) -> str:
    assert data.data is not None
    parts = [fingerprint_source(source, found[source], data.data_config) for source in data.data]
    return parts[0] if len(parts) == 1 else fingerprint_texts(parts)


def _texts(
    arguments: Arguments, own: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, found: Found
) -> tuple[datasets.Dataset | TextStream, datasets.Dataset, int]:
    """(to train on, held out, copies of held-out texts left out); `own` are the demonstration's texts, all distinct."""
    data = arguments.data
    if arguments.demo:
        parts = split_heldout(datasets.Dataset.from_dict({"text": own}))
        train, heldout = (tokenize(part, tokenizer, max_length) for part in parts)
        return train, heldout, 0
    assert data.data is not None
    where: dict[str, Any] = {
        "config": data.data_config,
        "text_column": data.text_column,
        "weights": data.data_weights,
        "found": found,
    }
    if not data.streaming:
        return load_splits(data.data, tokenizer, max_length, pair_column=data.text_pair_column, **where)
    if data.text_pair_column is not None:
        raise UsageError(f"--text_pair_column {data.text_pair_column} is not read from a stream: leave out --streaming")
    stream = _stream(data, tokenizer, max_length, arguments.training, where)
    return stream, tokenize(stream.heldout, tokenizer, max_length), 0


def _stream(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    training: TrainingArguments,
    where: dict[str, Any],
) -> TextStream:
    assert data.data is not None
    return TextStream(
        data.data,
        tokenizer,
        batch_size=training.train_batch_size,
        max_length=max_length,
        packing=data.packing,
        shuffle_buffer=data.shuffle_buffer,
        seed=training.seed if training.data_seed is None else training.data_seed,
        rank=training.process_index,
        world_size=training.world_size,
        num_workers=training.dataloader_num_workers,
        **where,
    )


def _check_image_flags(data: DataArguments) -> None:
    for flag in ("streaming", "packing", "data_weights", "max_length", "text_pair_column"):
        if getattr(data, flag):
            raise UsageError(f"--{flag} is for texts, and the teacher takes images")


def _images(
    data: DataArguments, processor: BaseImageProcessor, found: Found
) -> tuple[datasets.Dataset, datasets.Dataset]:
    assert data.data is not None
    return load_images(data.data, processor, config=data.data_config, image_column=data.image_column, found=found)


def _collator(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Collator:
    """Packed rows to train on; what is held out is padded."""
    packed = PackingCollator(tokenizer.pad_token_id, max_length)
    padded = DataCollatorWithPadding(tokenizer)

    def collate(features: list[dict[str, Any]]) -> Any:
        return packed(features) if "lengths" in features[0] else padded(features)

    return collate
