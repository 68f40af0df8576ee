"""Trials on a model: short inputs of whatever kind it takes, and a forward that leaves it as it was."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError, first_line
from minilm.models.capture import QKV, capture

_MOVED = 1e-5  # of a token's norm; what cannot be seen stays to the bit, but for experts whose batches differ


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without a head: `model.base_model`, where that is a model (DINOv3's is the stack of layers inside)."""
    base = cast(PreTrainedModel, model.base_model)
    return base if model.main_input_name in inspect.signature(base.forward).parameters else model


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The shortest input that a model takes, on its device: two tokens, or a blank image, film or sound.

    Raises:
        ValueError: a kind of input that is not known here.
    """
    name = model.main_input_name
    if name == "input_ids":
        return {name: random_tokens(model, 2)[None]}
    shape = _SHAPES.get(name, lambda config: None)(model.config)
    if shape is None:
        raise UsageError(
            f"{type(model).__name__} takes {name!r} of a form that is not known here: supported are input_ids, images "
            "and films (pixel_values), samples and spectrograms (input_values, input_features)"
        )
    return {name: torch.zeros(1, *shape, device=model.device, dtype=model.dtype)}


def check_no_films(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model of films: minilm-train reads texts and images, `DistillationTrainer` anything."""
    if model.main_input_name == "pixel_values" and probe_inputs(model)["pixel_values"].ndim == 5:
        raise UsageError(
            f"the teacher is a {type(model).__name__}, which takes films, and minilm-train reads texts and images: "
            "train its student in Python with DistillationTrainer"
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model of texts embeds."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def random_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """(count,) int64 on the model's device: different ordinary tokens, the same ones at every call."""
    rows = embedding_rows(model)
    named = {getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep", "mask")}
    special = {i for ids in named for i in (ids if isinstance(ids, list) else [ids])}  # Llama 3 has several ends
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: count + len(special)].tolist()
    return torch.tensor([token for token in order if token not in special][:count], device=model.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode: no dropout, so nothing is drawn from the global generator. Each module then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def model_tried(model: PreTrainedModel, what: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What the model's own code raises, `but` for some, becomes a `ValueError`: the model does not do `what`."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{type(model).__name__} does not {what} ({why})") from error


@torch.no_grad()
def last_hidden_state(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """(B, N, hidden_size), what the base model ends with, in eval mode."""
    base = base_of(model)
    takes_cache = "use_cache" in inspect.signature(base.forward).parameters
    with evaluating(base):
        hidden: Tensor = base(**inputs, **({"use_cache": False} if takes_cache else {}))[0]
    return hidden


def moved_tokens(
    model: PreTrainedModel, inputs: Mapping[str, Any], positions: tuple[int, ...], token: Tensor
) -> list[Tensor]:
    """For each of `positions` (N,) bool: of which tokens the output changes when `token` takes its place; B is 1."""
    before, moved = last_hidden_state(model, inputs)[0].float(), []
    for position in positions:
        changed = inputs["input_ids"].clone()
        changed[0, position] = token
        after = last_hidden_state(model, {**inputs, "input_ids": changed})[0].float()
        moved.append((after - before).norm(dim=-1) > _MOVED * before.norm(dim=-1))
    return moved


def is_causal(model: PreTrainedModel) -> bool:
    """Whether no token of the model sees one behind it; the model's relations are then causal too.

    Tried, not read from flags: one of eight random tokens is changed, the second or the last but one, and the model is
    causal if what it makes of the tokens before stays. Models of images and sound are not causal.

    Raises:
        ValueError: a model that looks ahead from some tokens only, or does not run on tokens alone.
    """
    base = base_of(model)
    if base.main_input_name != "input_ids":
        return False
    tokens = random_tokens(base, 9)
    inputs = {"input_ids": tokens[None, :8], "attention_mask": torch.ones_like(tokens[None, :8])}
    with model_tried(model, "run on a few random tokens alone"):
        early, late = moved_tokens(base, inputs, (1, 6), tokens[8])
    ahead = [bool(early[:1].any()), bool(late[:6].any())]
    if ahead[0] != ahead[1]:
        where = "early" if ahead[0] else "late"
        raise UsageError(
            f"{type(model).__name__} looks ahead from {where} tokens only: its relations would be neither causal nor "
            "free, and such masks are supported through prefix_lengths alone"
        )
    return not ahead[0]


def captured_and_hidden(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[QKV, Tensor]:
    """q, k, v of the last layer, and `last_hidden_state`."""
    with capture(base_of(model)) as captured:
        hidden = last_hidden_state(model, inputs)
    return captured[-1], hidden


def _pixels(config: Any) -> tuple[int, ...] | None:
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    image = (getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    frames = getattr(config, "num_frames", None)
    return (frames, *image) if isinstance(frames, int) else image


def _sound(config: Any) -> tuple[int, ...] | None:
    """A spectrogram (AST), or the samples of which the convolutions make two tokens (wav2vec 2.0 and its kin)."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return (config.max_length, config.num_mel_bins)
    if not hasattr(config, "conv_kernel"):
        return None
    samples = 2
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return (samples,)


def _features(config: Any) -> tuple[int, ...] | None:
    if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
        return None
    return (config.num_mel_bins, 2 * config.max_source_positions)  # Whisper's second convolution halves the frames


_SHAPES: dict[str, Callable[[Any], tuple[int, ...] | None]] = {
    "pixel_values": _pixels,
    "input_values": _sound,
    "input_features": _features,
}
