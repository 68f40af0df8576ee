"""Loading a teacher with its tokenizer, and how long a text it takes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

USUAL_LENGTH = 512  # of the papers


def load_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 without a head, and its tokenizer (which gets a padding token where it has none).

    Raises:
        ValueError: nothing that loads there, weights that are not the model's, no tokenizer of its vocabulary.
    """
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name)
            teacher, info = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        here = "" if Path(name).is_dir() else ", which is no folder here, from the hub"
        raise ValueError(f"cannot load the teacher {name!r}{here}: {reason}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # relations need no pooler
    if missing:
        raise ValueError(
            f"the weights of the teacher {name!r} lack {len(missing)} of its tensors, {missing[0]} for one"
        )
    rows = teacher.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer of {name!r} has {len(tokenizer)} tokens, the model embeds {rows}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name!r} has no padding token and no end-of-text token to pad with")
        tokenizer.pad_token = tokenizer.eos_token  # never seen: padding is masked in both models and in the loss
    return teacher, tokenizer


def resolve_length(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """`max_length` as given, or 512, or the teacher's positions where those are fewer.

    Raises:
        ValueError: more tokens than the teacher has positions, or none beside the special ones.
    """
    positions = getattr(teacher.config, "max_position_embeddings", None)
    for name, module in teacher.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from behind the padding's
    if max_length is None:
        return min(USUAL_LENGTH, positions or USUAL_LENGTH)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length {max_length} is more than the teacher's {positions} positions")
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise ValueError(f"max_length {max_length} leaves no room beside the tokenizer's {special} special tokens")
    return max_length


@contextmanager
def _quiet() -> Iterator[None]:
    """No load reports; what matters of them is checked above."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
