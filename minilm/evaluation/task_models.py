"""Loading a model with a new head for a task, and its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from minilm.errors import UsageError
from minilm.models.configs import read_config
from minilm.models.students import seeded
from minilm.models.teachers import (
    check_complete,
    check_length,
    check_tokenizer,
    check_weights,
    is_of_head,
    loading,
    quiet,
)


def load_for_task(
    name: str, auto_class: Any, max_length: int, seed: int, **config: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float32 model of that auto class, and a tokenizer that pads on the right, as learnt positions count.

    The head is new, and the same for the same `seed`. What a checkpoint has of another class's head that fits (BERT's
    pooler, ModernBERT's dense layer) is taken over, as transformers does; nothing is of a head that was fine-tuned.

    Args:
        config: what the model's config is to say of the head, `num_labels` for one.

    Raises:
        UsageError: nothing that loads there; weights that are not the model's; fewer positions than `max_length`;
            nothing to pad with.
    """
    with loading("model", name), quiet(), _without_bars():
        wanted = read_config(name, **config)
        with seeded(seed):
            model, info = auto_class.from_pretrained(
                name,
                config=wanted,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a head for another number of labels
            )
    with loading("model", name):
        info["mismatched_keys"] = [found for found in info["mismatched_keys"] if not is_of_head(found[0], model)]
        check_complete("model", name, (key for key in info["missing_keys"] if not is_of_head(key, model)))
        check_weights("model", name, model, info)
        if (wanted.architectures or [""])[0].endswith(("Classification", "QuestionAnswering")):
            _renew_head(model, auto_class, seed)
        check_length("model", model, max_length)
        with loading("model", name, "tokenizer"), quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        check_tokenizer(name, model, tokenizer)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise UsageError(f"the tokenizer of {name!r} has no padding token and no end-of-text token to pad with")
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders read a text's last token before the padding
    return model, tokenizer


def _renew_head(model: PreTrainedModel, auto_class: Any, seed: int) -> None:
    with seeded(seed):
        fresh = auto_class.from_config(model.config).state_dict()
    model.load_state_dict({key: tensor for key, tensor in fresh.items() if is_of_head(key, model)}, strict=False)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of loading, of which a grid has one a run."""
    were_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if were_shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
