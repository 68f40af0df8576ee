"""A model's config, looked at before the model is made by it."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

MOST_LAYERS = 10_000  # the deepest Transformers have some thousand


def read_config(name: str, **options: Any) -> PretrainedConfig:
    """Without code of its own. Raises whatever transformers does, and `ValueError` for layers that would take days."""
    config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"its config has {layers} layers, and no model more than {MOST_LAYERS}")
    return config
