"""What a model's head is given: the input of its output embeddings, up to which it runs, or a classifier's logits.

B batch, N tokens, V vocabulary, C classes, d hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
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
    head = _vocabulary_head(model)
    return ExampleOutput(model(**inputs).logits) if head is None else _run_up_to(model, head, inputs)


def check_output(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """One forward on a short input that shows whether the model's logits are those of `run_up_to_output`.

    Raises:
        ValueError: no head; a vocabulary head whose result the model changes (softcap, scale) or does not use; a
            classifier with one label or with several labels at once, where a softmax means nothing.
    """
    head = _vocabulary_head(model)
    name = type(model).__name__
    if head is None:
        labels, problem = len(model.config.id2label or ()), model.config.problem_type
        if labels < 2 or problem == "multi_label_classification":
            raise UsageError(
                f"{name} with {labels} labels and problem_type {problem!r} does not choose one of several labels, "
                "so there is no softmax to distil"
            )
        return
    expected: list[Tensor] = []

    def far_out(hidden: Tensor) -> Tensor:  # where a softcap shows
        x = torch.linspace(-1000.0, 1000.0, hidden.shape[-1]).to(hidden).expand_as(hidden)
        expected.append(nn.functional.linear(x, head.weight(), head.layer.bias))
        return x

    with head.replaced(far_out), torch.no_grad():
        logits = model(**inputs).logits
    if not (expected and torch.allclose(logits, expected[-1], rtol=1e-4)):
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
    return _vocabulary_head(model) is not None


class _VocabularyHead(NamedTuple):
    """The output embeddings, and of MobileBERT, where they are narrower than what is multiplied, the other columns."""

    layer: nn.Linear  # (V, d), of MobileBERT (V, d_embeddings)
    others: nn.Linear | None = None  # (d - d_embeddings, V)
    transform: nn.Module | None = None  # returns what is multiplied, where that is not what `layer` is called with

    def weight(self) -> Tensor:
        """(V, d), as it is now: outside of the forward FSDP may hold a shard of it."""
        return self.layer.weight if self.others is None else torch.cat([self.layer.weight, self.others.weight.mT], 1)

    def replaced(self, replace: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Has `replace` called with what is multiplied, (B, N, d), and its result multiplied instead."""
        if self.transform is not None:
            return self.transform.register_forward_hook(lambda _, __, hidden: replace(hidden))
        return self.layer.register_forward_pre_hook(lambda _, arguments: (replace(arguments[0]),))


def _vocabulary_head(model: PreTrainedModel) -> _VocabularyHead | None:
    """None for a classifier."""
    name = type(model).__name__
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        return None
    layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear):
        found = "nothing" if layer is None else type(layer).__name__
        raise UsageError(f"{name} has no head to distil: its output embeddings are {found}, not a Linear")
    if model.config.model_type != "mobilebert":
        return _VocabularyHead(layer)
    predictions: Any = model.get_submodule("cls.predictions")
    return _VocabularyHead(layer, predictions.dense, predictions.transform)


class _ReachedOutput(BaseException):
    """Ends a forward; not an `Exception`, so that no model's own `except` takes it."""


def _run_up_to(model: PreTrainedModel, head: _VocabularyHead, inputs: Mapping[str, Any]) -> TokenOutput:
    found: list[TokenOutput] = []

    def stop(hidden: Tensor) -> Tensor:
        found.append(TokenOutput(hidden, head.weight(), head.layer.bias))
        raise _ReachedOutput

    with head.replaced(stop):
        try:
            model(**inputs)
        except _ReachedOutput:
            return found[0]
    raise UsageError(
        f"{type(model).__name__} computes its logits without calling its output layer: use another teacher"
    )
