"""Loading a teacher with what prepares its inputs, and how long a text it takes."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from minilm.batches import first_position

USUAL_LENGTH = 512  # of the papers

_HEADS: dict[str, Any] = {  # by the end of the class's name
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForPreTraining": AutoModelForMaskedLM,  # BERT's and its kin's two heads, one of them the masked LM's
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForImageClassification": AutoModelForImageClassification,
}


def load_teacher(
    name: str, *, head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | BaseImageProcessor]:
    """The model in float32, and its tokenizer (which gets a padding token where it has none) or image processor.

    Without `head` the model is the base; with it, it is of the class that it was saved as, if that is a masked LM, a
    causal LM or a classifier.

    Raises:
        ValueError: nothing that loads there, weights that are not the model's, no tokenizer of its vocabulary; with
            `head`, no such head or none among the weights.
    """
    try:
        with quiet():
            load = _class_with_head(name) if head else AutoModel
            teacher, info = load.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            images = teacher.main_input_name == "pixel_values"
            processor = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(name)
    except _NoHeadError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        here = "" if Path(name).is_dir() else ", which is no folder here, from the hub"
        raise ValueError(f"cannot load the teacher {name!r}{here}: {reason}") from error
    _check_weights(name, teacher, info["missing_keys"], head)
    if not images:
        _check_tokenizer(name, teacher, processor)
    return teacher, processor


def auto_class(model: PreTrainedModel) -> Any:
    """The Auto class that loads a model of this class with its head, `AutoModel` for a base model."""
    return _head_loader(type(model).__name__) or AutoModel


def resolve_length(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """`max_length` as given, or 512, or the teacher's positions where those are fewer.

    Raises:
        ValueError: more tokens than the teacher has positions, or none beside the special ones.
    """
    positions = getattr(teacher.config, "max_position_embeddings", None)
    if positions is not None:
        positions -= first_position(teacher)
    if max_length is None:
        return min(USUAL_LENGTH, positions or USUAL_LENGTH)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length {max_length} is more than the teacher's {positions} positions")
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise ValueError(f"max_length {max_length} leaves no room beside the tokenizer's {special} special tokens")
    return max_length


class _NoHeadError(ValueError):
    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"the teacher {name!r} has no trained head ({why}): leave out --output_weight")


def _class_with_head(name: str) -> Any:
    saved_as = (AutoConfig.from_pretrained(name).architectures or ["an unnamed class"])[0]
    if load := _head_loader(saved_as):
        return load
    raise _NoHeadError(name, f"it was saved as {saved_as}")


def _head_loader(class_name: str) -> Any:
    return next((load for ending, load in _HEADS.items() if class_name.endswith(ending)), None)


def _check_weights(name: str, teacher: PreTrainedModel, missing_keys: Iterable[str], head: bool) -> None:
    body = f"{teacher.base_model_prefix}."
    missing = sorted(key for key in missing_keys if not key.startswith("pooler."))  # a base's, relations need none
    # A classifier's pooler is part of its head.
    of_head = [key for key in missing if head and (not key.startswith(body) or key.startswith(f"{body}pooler."))]
    if of_head:
        raise _NoHeadError(name, f"its weights lack {of_head[0]}")
    if missing:
        raise ValueError(
            f"the weights of the teacher {name!r} lack {len(missing)} of its tensors, {missing[0]} for one"
        )


def _check_tokenizer(name: str, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    special = len(tokenizer.all_special_tokens)
    if len(tokenizer) <= special:  # what transformers makes of a folder without tokenizer files
        raise ValueError(f"the tokenizer of {name!r} has no tokens but {special} special ones: are its files there?")
    rows = len(cast(nn.Embedding, teacher.get_input_embeddings()).weight)
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer of {name!r} has {len(tokenizer)} tokens, the model embeds {rows}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name!r} has no padding token and no end-of-text token to pad with")
        tokenizer.pad_token = tokenizer.eos_token  # never seen: padding is masked in both models and in the loss


@contextmanager
def quiet() -> Iterator[None]:
    """No load reports; what matters of them is checked above."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
