"""Tiny random models of all families that the tests name, and inputs for them.

Hidden size 32, 4 heads, 4 layers (so that a half and a middle exist), 60 tokens; a fraction of a second each.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from minilm.models.probes import probe_inputs

VOCABULARY = 60
_NAMED = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128}
_TEXT = {**_NAMED, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_MODERNBERT = {**_TEXT, **_IDS, "cls_token_id": 1, "sep_token_id": 2, "intermediate_size": 48, "local_attention": 8}
_DISTILBERT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "dim": 32, "n_heads": 4, "n_layers": 4}

_GROUPED = {**_TEXT, **_IDS, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
_IMAGES = {**_NAMED, "image_size": 16, "patch_size": 8}
_CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
}
_SOUNDS = {**_NAMED, **_CONVOLUTIONS}
_WHISPER = {
    **_IDS,
    "vocab_size": VOCABULARY,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 32,
    "max_source_positions": 10,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}

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
    "xlm-roberta": ("XLMRoberta", {**_TEXT, **_IDS}),
    "camembert": ("Camembert", {**_TEXT, **_IDS}),
    "data2vec-text": ("Data2VecText", {**_TEXT, **_IDS}),
    "mobilebert": (
        "MobileBert",
        {**_TEXT, "intermediate_size": 32, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    ),
    "eurobert": ("EuroBert", {**_TEXT, **_IDS}),
    "nomic_bert": ("NomicBert", _TEXT),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", _TEXT),
    "ernie": ("Ernie", _TEXT),
    "xmod": ("Xmod", {**_TEXT, **_IDS, "languages": ["en_XX"], "default_language": "en_XX"}),
    "roc_bert": ("RoCBert", {**_TEXT, "pronunciation_vocab_size": 60, "shape_vocab_size": 60}),
    "esm": ("Esm", {**_TEXT, "mask_token_id": 4, "position_embedding_type": "rotary", "token_dropout": True}),
    "layoutlm": ("LayoutLM", _TEXT),
    "clip_text_model": ("CLIPText", {**_TEXT, **_IDS}),
    "gpt_neox": ("GPTNeoX", {**_TEXT, **_IDS}),
    "mistral": ("Mistral", {**_TEXT, "num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2": ("Qwen2", {**_TEXT, "num_key_value_heads": 2}),
    "gemma": ("Gemma", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma3_text": ("Gemma3Text", _GROUPED),
    "embeddinggemma": ("Gemma3Text", {**_GROUPED, "use_bidirectional_attention": True}),
    "modernbert-decoder": ("ModernBertDecoder", _MODERNBERT),
    "phi": ("Phi", _TEXT),
    "phi3": ("Phi3", {**_TEXT, **_IDS}),
    "opt": ("OPT", {**_TEXT, "word_embed_proj_dim": 32, "ffn_dim": 128}),
    "smollm3": ("SmolLM3", {**_TEXT, **_IDS, "num_key_value_heads": 2}),
    "olmo": ("Olmo", _TEXT),
    "olmo2": ("Olmo2", _TEXT),
    "granite": ("Granite", _TEXT),
    "starcoder2": ("Starcoder2", {**_TEXT, "num_key_value_heads": 2}),
    "cohere": ("Cohere", _TEXT),
    "deit": ("DeiT", _IMAGES),
    "vit_msn": ("ViTMSN", _IMAGES),
    "vit_mae": ("ViTMAE", _IMAGES),
    "dinov2": ("Dinov2", {**_IMAGES, "mlp_ratio": 4}),
    "dinov2_with_registers": ("Dinov2WithRegisters", {**_IMAGES, "mlp_ratio": 4}),
    "dinov3_vit": ("DINOv3ViT", _IMAGES),
    "beit": ("Beit", {**_IMAGES, "use_relative_position_bias": True}),
    "ijepa": ("IJepa", _IMAGES),
    "siglip_vision_model": ("SiglipVision", _IMAGES),
    "clip_vision_model": ("CLIPVision", _IMAGES),
    "videomae": ("VideoMAE", {**_IMAGES, "num_frames": 2}),
    "vivit": ("Vivit", {**_IMAGES, "num_frames": 2, "tubelet_size": [1, 8, 8]}),
    "wav2vec2": ("Wav2Vec2", _SOUNDS),
    "hubert": ("Hubert", _SOUNDS),
    "audio-spectrogram-transformer": (
        "AST",
        {**_NAMED, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
    "whisper": ("Whisper", _WHISPER),
    "swin": ("Swin", {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "wavlm": ("WavLM", _SOUNDS),
    "megatron-bert": ("MegatronBert", _TEXT),
    "rembert": ("RemBert", _TEXT),
    "roformer": ("RoFormer", _TEXT),
    "luke": ("Luke", {**_TEXT, "entity_vocab_size": 10}),
    "convbert": ("ConvBert", _TEXT),
    "longformer": ("Longformer", {**_TEXT, "attention_window": 8}),
    "xlnet": ("XLNet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64}),
    "falcon": ("Falcon", _TEXT),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "mpt": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}),
    "xglm": (
        "XGLM",
        {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 64},
    ),
    "gpt_neo": (
        "GPTNeo",
        {
            **_IDS,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "max_position_embeddings": 64,
        },
    ),
    "blip_vision_model": ("BlipVision", _IMAGES),
    "timesformer": ("Timesformer", {**_IMAGES, "num_frames": 2}),
    "swinv2": ("Swinv2", {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "data2vec-vision": ("Data2VecVision", _IMAGES),
    "mpnet": ("MPNet", _TEXT),
    "deberta": ("DebertaV2", _TEXT),
    "bart": ("Bart", {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
}


def is_there(family: str) -> bool:
    """Whether the installed transformers has it."""
    return hasattr(transformers, f"{_FAMILIES[family][0]}Config")


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


def tiny_encoder(family: str, **config: Any) -> PreTrainedModel:
    """`tiny_model` of the class that a student has: of T5 and Whisper the encoder."""
    if family == "whisper":
        encoder: PreTrainedModel = tiny_model(family, **config).get_encoder()
        return encoder
    return tiny_model(family, "EncoderModel" if family == "t5" else "Model", **config)


def tiny_inputs(model: PreTrainedModel, lengths: tuple[int, ...] = (11, 6), seed: int = 0) -> dict[str, Tensor]:
    """Random tokens with right padding to the longest of `lengths`, or as many random images, films or sounds."""
    generator = torch.Generator().manual_seed(seed)
    name = model.main_input_name
    if name == "input_values" and hasattr(model.config, "conv_kernel"):
        return {name: torch.randn(len(lengths), 200, generator=generator)}  # twelve tokens
    if name != "input_ids":
        return {name: torch.randn(len(lengths), *probe_inputs(model)[name].shape[1:], generator=generator)}
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(5, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": tokens * mask, "attention_mask": mask}
