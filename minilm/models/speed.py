"""How fast a model reads text or looks at images, forward only, as it will be used after distillation."""

import itertools
import time
from collections.abc import Sequence

import torch
from torch import nn

from minilm.models.batches import Batch, count_sequences, count_tokens, in_its_dtype


def measure_speed(model: nn.Module, batches: Sequence[Batch], seconds: float) -> dict[str, float]:
    """{"sequences_per_second", "tokens_per_second"} of the whole model in eval mode, padding not counted as tokens; of
    images {"images_per_second"}.

    Args:
        batches: the model's inputs on its device, texts with an attention_mask (B, N); the first one warms up, then
            all go round until the time is spent.
        seconds: how long to measure; a batch that has begun is finished.
    """
    training = model.training
    model.eval()
    batches = [in_its_dtype(model, batch) for batch in batches]
    sequences = tokens = 0
    with torch.inference_mode():
        model(**batches[0])
        start = _now(batches[0])
        for batch in itertools.cycle(batches):
            model(**batch)
            elapsed = _now(batch) - start
            sequences += int(count_sequences(batch))
            tokens += int(count_tokens(batch))
            if elapsed >= seconds:
                break
    model.train(training)
    if not tokens:
        return {"images_per_second": sequences / elapsed}
    return {"sequences_per_second": sequences / elapsed, "tokens_per_second": tokens / elapsed}


def _now(batch: Batch) -> float:
    if next(iter(batch.values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
