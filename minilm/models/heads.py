"""What a model's head is given: the input of its output embeddings, up to which it runs, or a classifier's logits.

B batch, N tokens, V vocabulary, C classes, d hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError


class TokenOutput(NamedTuple):
    """What a vocabulary head multiplies into logits: hidden @ weight.T + bias."""

    hidden: Tensor  # (B, N, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)


class ExampleOutput(NamedTuple):
    """The logits of a classifier."""

    logits: Tensor  # (B, C)


Output = TokenOutput | ExampleOutput


def run_up_to_output(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Output:
    """What the head makes of a forward on `inputs`.

    A model with a vocabulary head (masked or causal LM) gives `TokenOutput`, and no logits are computed; one with a
    classifier gives `ExampleOutput`. Gradients flow if they are enabled, into tied embeddings too.

    Raises `ValueError` for a model without such a head. That nothing comes after the output layer is `check_output`'s
    to see.
    """
    output_layer = _output_layer(model)
    return ExampleOutput(model(**inputs).logits) if output_layer is None else _run_up_to(model, output_layer, inputs)


def check_output(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """One forward on a short input that shows whether the model's logits are those of `run_up_to_output`.

    Raises:
        ValueError: no head; a vocabulary head whose result the model changes (softcap, scale) or does not use; a
            classifier with one label or with several labels at once, where a softmax means nothing.
    """
    output_layer = _output_layer(model)
    name = type(model).__name__
    if output_layer is None:
        labels, problem = len(model.config.id2label or ()), model.config.problem_type
        if labels < 2 or problem == "multi_label_classification":
            raise UsageError(
                f"{name} with {labels} labels and problem_type {problem!r} does not choose one of several labels, "
                "so there is no softmax to distil"
            )
        return
    expected = torch.linspace(-1000.0, 1000.0, output_layer.out_features)  # far out, where a softcap shows

    def replace(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        return expected.to(logits).expand_as(logits)

    with output_layer.register_forward_hook(replace), torch.no_grad():
        logits = model(**inputs).logits
    if not torch.equal(logits, expected.to(logits).expand_as(logits)):
        raise UsageError(f"{name} does not return what its output layer computes, but changes it: use another teacher")


@torch.no_grad()
def logits_of_first(model: PreTrainedModel, texts: Sequence[Sequence[int]], padding: int = 0) -> Tensor:
    """The logits of the first text, (N, V) or (C,), in one forward of all of them, padded on the right."""
    longest = max(map(len, texts))
    rows = [[*text, *[padding] * (longest - len(text))] for text in texts]
    mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    logits: Tensor = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits[0]
    return logits[: len(texts[0])] if has_vocabulary_head(model) else logits


def has_vocabulary_head(model: PreTrainedModel) -> bool:
    """Whether the output loss is one of tokens, not of examples. Raises `ValueError` for a model without a head."""
    return _output_layer(model) is not None


def _output_layer(model: PreTrainedModel) -> nn.Linear | None:
    """The model's output embeddings; None for a classifier."""
    name = type(model).__name__
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        return None
    layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear):
        found = "nothing" if layer is None else type(layer).__name__
        raise UsageError(f"{name} has no head to distil: its output embeddings are {found}, not a Linear")
    return layer


class _ReachedOutput(BaseException):
    """Ends a forward; not an `Exception`, so that no model's own `except` takes it."""


def _run_up_to(model: PreTrainedModel, output_layer: nn.Linear, inputs: Mapping[str, Any]) -> TokenOutput:
    found: list[TokenOutput] = []

    def stop(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        # The weight as it is now: outside of the forward FSDP may hold a shard of it.
        found.append(TokenOutput(arguments[0], layer.weight, layer.bias))
        raise _ReachedOutput

    with output_layer.register_forward_pre_hook(stop):
        try:
            model(**inputs)
        except _ReachedOutput:
            return found[0]
    raise UsageError(
        f"{type(model).__name__} computes its logits without calling its output layer: use another teacher"
    )
