"""A model's own attention probabilities, from its eager form, against those of the captured q and k."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilm.models.capture import capture
from minilm.models.layers import num_layers


def own_attention_matches(model: PreTrainedModel, inputs: Mapping[str, Tensor], tolerance: float = 1e-5) -> bool:
    """Whether softmax(q kᵀ/√d) of the captured tensors is in every layer what the model calls its attentions."""
    return max(own_attention_errors(model, inputs)) <= tolerance


@torch.no_grad()
def own_attention_errors(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[float]:
    """Layer by layer the largest |softmax(q kᵀ/√d) − attention| of real tokens, over the keys that the mask allows."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    own = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    layers = range(1, num_layers(model) + 1)
    with capture(model, layers) as captured:
        model(**inputs)
    tokens = inputs.get("attention_mask")
    rows = 1.0 if tokens is None else tokens[:, None, :, None]  # what padding attends to is the model's own affair
    errors = []
    for layer, attention in zip(layers, own, strict=True):
        q, k, _ = captured[layer]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(attention == 0, -torch.inf)
        errors.append(((scores.softmax(-1) - attention).abs() * rows).max().item())
    return errors
