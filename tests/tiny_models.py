"""Tiny random models of the families that the tests go through, and inputs for them.

Hidden size 32, 4 heads, 4 layers (so that a half and a middle exist), 60 tokens; a fraction of a second each.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 60
_NAMED = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128}
_TEXT = {**_NAMED, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_MODERNBERT = {**_TEXT, **_IDS, "cls_token_id": 1, "sep_token_id": 2, "intermediate_size": 48, "local_attention": 8}
_DISTILBERT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "dim": 32, "n_heads": 4, "n_layers": 4}

# name: (prefix of the classes, arguments of the config)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _TEXT),
    "roberta": ("Roberta", {**_TEXT, **_IDS}),
    "distilbert": ("DistilBert", {**_DISTILBERT, "hidden_dim": 128}),
    "electra": ("Electra", {**_TEXT, "embedding_size": 16}),
    "albert": ("Albert", {**_TEXT, "embedding_size": 16}),
    "modernbert": ("ModernBert", _MODERNBERT),
    "llama": ("Llama", {**_TEXT, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}),  # grouped; head_dim is not 32 / 4
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 4, **_IDS}),
    "gemma2": ("Gemma2", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}),  # softcap: eager only
    "t5": ("T5", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 128, "num_layers": 4, "num_heads": 4}),
    "vit": ("ViT", {**_NAMED, "image_size": 16, "patch_size": 8}),
    "mpnet": ("MPNet", _TEXT),
    "deberta": ("DebertaV2", _TEXT),
    "bart": ("Bart", {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
}


def tiny_model(family: str, head: str = "Model", seed: int = 0, **config: Any) -> PreTrainedModel:
    """In eval mode, with large weights so that attention is far from uniform; `head` is the class name's end.

    `attn_implementation` may stand among the arguments of the config.
    """
    prefix, arguments = _FAMILIES[family]
    make_config: Callable[..., Any] = getattr(transformers, f"{prefix}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, prefix + head)(make_config(**{**arguments, **config}))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_inputs(model: PreTrainedModel, lengths: tuple[int, ...] = (11, 6), seed: int = 0) -> dict[str, Tensor]:
    """Random tokens with right padding to the longest of `lengths`, or as many random images."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(len(lengths), 3, 16, 16, generator=generator)}
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(5, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": tokens * mask, "attention_mask": mask}
