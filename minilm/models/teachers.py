"""Loading a teacher with what prepares its inputs, and how long a text it takes."""

import copy
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
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

from minilm.errors import UsageError
from minilm.models.configs import read_config
from minilm.models.heads import has_vocabulary_head, logits_of_first
from minilm.models.probes import embedding_rows
from minilm.models.teacher_files import explain, one_line

USUAL_LENGTH = 512  # of the papers

_HEADS: dict[str, Any] = {  # by the end of the class's name
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForPreTraining": AutoModelForMaskedLM,  # BERT's and its kin's two heads, one of them the masked LM's
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForImageClassification": AutoModelForImageClassification,
}
# Of a body, what older versions saved although it follows from the config, and what only masked inputs use.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|relative_position_index|version"
    r"|mask_token|masked_spec_embed)$"
)

Processor = PreTrainedTokenizerBase | BaseImageProcessor


class Teacher(NamedTuple):
    """A teacher, and what prepares its inputs: as training needs it, and as the student is saved with it."""

    model: PreTrainedModel
    processor: Processor
    saved_processor: Processor


def load_teacher(name: str, *, head: bool = False) -> tuple[PreTrainedModel, Processor]:
    """The model in float32, and its tokenizer or image processor, made ready as `read_teacher` does; raises as it."""
    return read_teacher(name, head=head)[:2]


def read_teacher(name: str, *, head: bool = False) -> Teacher:
    """The model in float32, and its tokenizer or image processor twice: ready for training, and as its files have it.

    The tokenizer for training pads on the right, whatever the teacher's does: learnt positions count from the left. One
    without a padding token gets the one of the config, or else the end-of-text token. A classifier that finds a
    text's end by its config's padding token is given the tokenizer's.

    Without `head` the model is the base; with it, it is of the class that it was saved as, if that is a masked LM, a
    causal LM or a classifier. Code that comes with a checkpoint is never run.

    Raises:
        ValueError: nothing that loads there, several models in one, quantised weights, weights that are not the model's
            or not finite, no tokenizer of its vocabulary; with `head`, no such head or none among the weights, or
            one whose output for a text depends on its padding.
    """
    with loading("teacher", name):
        return _read_teacher(name, head)


def _read_teacher(name: str, head: bool) -> Teacher:
    with loading("teacher", name), quiet():
        if os.path.isfile(os.path.join(name, "adapter_config.json")):
            raise ValueError("an adapter")  # which transformers would load with another model below it
        config = read_config(name)
    _check_kind(name, config)
    load = _class_with_head(name, config) if head else AutoModel
    with loading("teacher", name), quiet():
        model, info = load.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # of which the loading report tells, in place of an error without sizes
        )
    _check_missing(name, model, info["missing_keys"], head)
    check_weights("teacher", name, model, info)
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise UsageError(
            f"the teacher {name!r} is a {type(model).__name__}, which takes {model.main_input_name}: name a model of "
            "texts or images"
        )
    images = model.main_input_name == "pixel_values"
    with loading("teacher", name, "image processor" if images else "tokenizer"), quiet():
        processor = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(name, trust_remote_code=False)
    saved = copy.deepcopy(processor)
    if not images:
        check_tokenizer(name, model, processor)
        processor.padding_side = "right"
        _set_padding(name, model, processor, head)
    return Teacher(model, processor, saved)


def auto_class(model: PreTrainedModel) -> Any:
    """The Auto class that loads a model of this class with its head, `AutoModel` for a base model."""
    return _head_loader(type(model).__name__) or AutoModel


def resolve_length(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None, *, pairs: bool = False
) -> int:
    """`max_length` as given, or 512, or the teacher's positions where those are fewer.

    Args:
        pairs: whether two texts make a sequence.

    Raises:
        ValueError: more tokens than the teacher has positions, or none beside the special ones.
    """
    length = min(USUAL_LENGTH, positions(teacher) or USUAL_LENGTH) if max_length is None else max_length
    check_length("teacher", teacher, length)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if length <= special:
        of_pair = " of a pair" if pairs else ""
        raise UsageError(f"max_length {length} leaves no room beside the tokenizer's {special} special tokens{of_pair}")
    return length


def check_length(who: str, model: PreTrainedModel, length: int) -> None:
    """Raises `ValueError` for texts of more tokens than the model has positions."""
    longest = positions(model)
    if longest is not None and length > longest:
        raise UsageError(f"max_length {length} is more than the {who}'s {longest} positions")


def positions(model: PreTrainedModel) -> int | None:
    """The longest text that the config and the tables of positions allow, None where they name no limit."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None) or 0]  # XLNet's -1 is none either
    for name, table in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(table, nn.Embedding) and (last == "wpe" or ("pos" in last and "rel" not in last)):
            # RoBERTa and its kin count from behind the padding's position, OPT and its from an offset.
            before = int(getattr(table, "offset", 0)) if table.padding_idx is None else table.padding_idx + 1
            limits.append(len(table.weight) - before)
    return min((limit for limit in limits if limit > 0), default=None)


@contextmanager
def loading(who: str, name: str, part: str = "") -> Iterator[None]:
    """Whatever the loading libraries raise, as one sentence about the teacher, or who else is loaded.

    So are errors of ours in what follows from the files: a config may hold anything under any name.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        of_part = f"its {part}: " if part else ""
        here = "" if os.path.exists(name) else ", which is no folder here, from the hub"
        raise UsageError(f"cannot load the {who} {name!r}{here}: {of_part}{explain(name, error, part, who)}") from error


class _NoHeadError(UsageError):
    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"the teacher {name!r} has no trained head ({why}): leave out --output_weight, or take another --objective"
        )


def _check_kind(name: str, config: Any) -> None:
    """Before the weights are read: whether the config is that of one model, in float numbers."""
    parts = sorted(type(config).sub_configs)
    if config.is_encoder_decoder:
        raise UsageError(
            f"the teacher {name!r} is an encoder-decoder ({config.model_type}), of which relations are taken from one "
            "half: name a model that is an encoder or a decoder alone, or distil model.get_encoder() in Python with "
            "attention_qkv and fused_minilm_loss"
        )
    if len(parts) > 1 and ("text_config" in parts or not hasattr(config, "hidden_size")):
        raise UsageError(
            f"the teacher {name!r} is several models in one ({config.model_type}: {', '.join(parts)}): save the one to "
            "distil with its tokenizer or image processor in a folder of its own, and name that"
        )
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else type(quantised).__name__
        raise UsageError(f"the weights of the teacher {name!r} are quantised ({method}): name its unquantised weights")


def _class_with_head(name: str, config: Any) -> Any:
    saved_as = (config.architectures or ["an unnamed class"])[0]
    if load := _head_loader(saved_as):
        return load
    raise _NoHeadError(name, f"it was saved as {saved_as}")


def _head_loader(class_name: str) -> Any:
    return next((load for ending, load in _HEADS.items() if class_name.endswith(ending)), None)


def check_complete(who: str, name: str, missing: Iterable[str], why: str = "") -> None:
    """Raises `ValueError` for tensors of a model that its weights lack; `why` ends its sentence."""
    if lacking := sorted(missing):
        raise UsageError(
            f"the weights of the {who} {name!r} lack {len(lacking)} of its tensors, {lacking[0]} for one{why}"
        )


def check_weights(who: str, name: str, model: PreTrainedModel, info: Mapping[str, Iterable[Any]]) -> None:
    """Raises `ValueError` for weights of other sizes, of a body that the model is not, or not finite."""
    if mismatched := sorted(info["mismatched_keys"]):
        key, saved, wanted = mismatched[0]
        raise UsageError(
            f"the weights of the {who} {name!r} do not fit its config: {key} is {tuple(saved)}, the config makes it "
            f"{tuple(wanted)}{_and_others(mismatched)}"
        )
    if dropped := sorted(key for key in info["unexpected_keys"] if _is_of_body(key, model)):
        raise UsageError(
            f"the {who} {name!r} has weights that {type(model).__name__} does not take, {dropped[0]} for one"
            f"{_and_others(dropped)}: its config.json tells of another model, or of one that this transformers lacks"
        )
    for key, parameter in model.named_parameters():
        low, high = parameter.detach().aminmax() if parameter.numel() else (parameter.new_zeros(()),) * 2
        if not (low.isfinite() and high.isfinite()):  # NaN is the least and the greatest
            raise UsageError(f"the {who} {name!r} has weights that are not finite numbers: {key} holds NaN or inf")


def _check_missing(name: str, model: PreTrainedModel, missing_keys: Iterable[str], head: bool) -> None:
    missing = sorted(key for key in missing_keys if not key.startswith("pooler."))  # a base's, relations need none
    of_head = [key for key in missing if head and is_of_head(key, model)]
    if of_head:
        raise _NoHeadError(name, f"its weights lack {of_head[0]}")
    if missing:
        (saved_as, *_), made = model.config.architectures or [""], type(model).__name__
        other = saved_as not in ("", made) and _head_loader(saved_as) is None
        why = f": they are of a {saved_as}, and transformers loads a {made}" if other else ""
        check_complete("teacher", name, missing, why)


def is_of_head(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to the head of a model that has one; a classifier's pooler is part of it."""
    body = f"{model.base_model_prefix}."
    return not key.startswith(body) or key.startswith(f"{body}pooler.")


def _is_of_body(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor that was not taken belongs into the base model, so that without it another model would run.

    A body's tensors have the base model's prefix, or the name of one of its modules: another task's head has neither. A
    pooler is as good as a head, and so is what stands beside the head that was loaded.
    """
    prefix = f"{model.base_model_prefix}."
    inner = key.removeprefix(prefix)
    top = inner.partition(".")[0]
    if top == "pooler" or _NOT_WEIGHTS.search(key):
        return False
    return key.startswith(prefix) or hasattr(model.base_model, top)


def _and_others(found: list[Any]) -> str:
    return f" (of {len(found)})" if len(found) > 1 else ""


def check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        special = len(tokenizer.all_special_ids)
    except Exception as error:  # RecursionError, where the unknown token is itself unknown
        raise UsageError(f"the tokenizer of {name!r} does not know its special tokens: {one_line(error)}") from error
    if len(tokenizer) <= special:  # what transformers makes of a folder without tokenizer files
        raise UsageError(f"the tokenizer of {name!r} has no tokens but {special} special ones: are its files there?")
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise UsageError(f"the tokenizer of {name!r} has {len(tokenizer)} tokens, the model embeds {rows}")
    try:
        tokenizer(["a"], truncation=True, max_length=8)
    except Exception as error:
        raise UsageError(
            f"the {type(tokenizer).__name__} of {name!r} does not take a plain text: {one_line(error)}"
        ) from error


def _set_padding(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: bool) -> None:
    """Has tokenizer and model agree on the padding token; with a head, a trial shows that they do."""
    if tokenizer.pad_token_id is not None:
        candidates = [tokenizer.pad_token_id]
    else:
        by_config = model.config.get_text_config().pad_token_id
        known = [by_config] if by_config is not None and 0 <= by_config < len(tokenizer) else []
        candidates = [*known, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        if not candidates:
            raise UsageError(f"the tokenizer of {name!r} has no padding token and no end-of-text token to pad with")
        if head and not has_vocabulary_head(model):  # which may not take a text's own last token for padding
            candidates += [token for token in tokenizer.all_special_ids if token not in candidates]
    if not head:
        _pad_with(tokenizer, candidates[0])
        return
    short, long = (tokenizer([text])["input_ids"][0] for text in ("a", "a b c d e f"))
    alone, own = logits_of_first(model, [short]), model.config.pad_token_id
    for token in candidates:
        _pad_with(tokenizer, token)
        for of_config in dict.fromkeys((own, token)):
            model.config.pad_token_id = of_config
            if _same_in_a_batch(model, alone, [short, long], token):
                return
    raise UsageError(
        f"{type(model).__name__} of {name!r} gives a text another output in a batch than alone, whether its config "
        f"pads with {own} or the tokenizer's {candidates[0]}: use another teacher, or leave out --output_weight"
    )


def _pad_with(tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    if tokenizer.pad_token_id != token:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)


def _same_in_a_batch(model: PreTrainedModel, alone: torch.Tensor, texts: list[list[int]], padding: int) -> bool:
    try:
        together = logits_of_first(model, texts, padding)
    except ValueError:  # no padding token, which some classifiers want in a batch
        return False
    return bool((together - alone).abs().max() <= 1e-3 * alone.abs().max().clamp(min=1e-3))


@contextmanager
def quiet() -> Iterator[None]:
    """No load reports; what matters of them is checked above."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
