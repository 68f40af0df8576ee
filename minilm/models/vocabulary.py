"""Embeddings cut to a smaller vocabulary: rows of the tables, and the numbers of tokens that a config names.

V tokens before, d width of the table.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.batches import first_position
from minilm.models.probes import evaluating

TRIED = 8  # tokens


def named_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that a model knows by number: those of its config, and all below the padding where positions count
    from that.
    """
    named = {token for config in _configs(model) for ids in _ids(config).values() for token in ids}
    return named | set(range(first_position(model)))


@torch.no_grad()
def cut_embeddings(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leaves a model the rows `kept` of its embeddings and of its output layer, in this order, in place.

    Args:
        kept: ascending numbers below V.

    Raises:
        ValueError: a model that makes of a kept token something else then, because its table is not all that it knows
            of a token.
    """
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    size, padding = len(embeddings.weight), embeddings.padding_idx
    rows, some = torch.tensor(kept, device=model.device), slice(None, None, max(1, len(kept) // TRIED))
    before = _outputs(model, rows[some])
    heads: list[Any] = [module for module in model.modules() if _has_bias(module, size, output)]
    tensors = [embeddings.weight, *(head.bias for head in heads)]
    tensors += [] if output is None else [output.weight, output.bias]
    if output is not None and model.config.model_type == "mobilebert":  # the other columns of its output layer
        tensors.append(cast(Any, model).cls.predictions.dense.weight.mT)
    for tensor in {id(tensor): tensor for tensor in tensors if tensor is not None}.values():  # tied ones once
        tensor[: len(rows)] = tensor[rows]
    biases = [nn.Parameter(head.bias[: len(rows)].clone()) for head in heads]
    model.resize_token_embeddings(len(rows))
    for head, bias in zip(heads, biases, strict=True):
        head.bias = bias  # which transformers leaves long, or replaces by the output layer's
    new = {token: number for number, token in enumerate(kept)}
    cast(nn.Embedding, model.get_input_embeddings()).padding_idx = None if padding is None else new.get(padding)
    for config in _configs(model):
        _renumber(config, new, size)
    after = _outputs(model, torch.arange(len(rows), device=model.device)[some])
    if output is not None:
        before = before[..., rows]
    if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise UsageError(
            f"the {type(model).__name__} cannot be cut to --student_vocabulary: its embeddings are not all that it "
            "knows of a token"
        )


def _has_bias(module: Any, size: int, output: Any) -> bool:
    """Whether it is a head with a bias beside the output layer's: BERT's and its kin's where weights are not tied."""
    bias = getattr(module, "bias", None)
    if not any(True for _ in module.children()) or not isinstance(bias, nn.Parameter):
        return False
    return bias.shape == (size,) and bias is not getattr(output, "bias", None)


def _outputs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The logits of a model with a head, else the last hidden state, for a text of these tokens."""
    with evaluating(model):
        outputs: Tensor = model(input_ids=tokens[None])[0]
    return outputs.float()


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    yield model.config
    if (generation := getattr(model, "generation_config", None)) is not None:
        yield generation


def _ids(config: Any) -> dict[str, list[int]]:
    """By name the tokens that a config names, one or several."""
    found = {name: value for name, value in vars(config).items() if name.endswith("token_id") and value is not None}
    return {name: value if isinstance(value, list) else [value] for name, value in found.items()}


def _renumber(config: Any, new: Mapping[int, int], size: int) -> None:
    """Rows below `size` that are not there any more are not named any more; a number without a row stays."""
    for name, ids in _ids(config).items():
        numbers = [new.get(token, token) for token in ids if token in new or token not in range(size)]
        several = isinstance(getattr(config, name), list)
        setattr(config, name, numbers if several else numbers[0] if numbers else None)
