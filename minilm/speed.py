"""How fast a model reads text, forward only, as it will be used after distillation."""

import itertools
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def measure_speed(model: nn.Module, batches: Sequence[Batch], seconds: float) -> dict[str, float]:
    """{"sequences_per_second", "tokens_per_second"} of the whole model in eval mode, padding not counted as tokens.

    Args:
        batches: the model's inputs on its device, each with an attention_mask (B, N); the first one warms up, then all
            go round until the time is spent.
        seconds: how long to measure; a batch that has begun is finished.
    """
    training = model.training
    model.eval()
    sequences = tokens = 0
    with torch.inference_mode():
        model(**batches[0])
        start = _now(batches[0])
        for batch in itertools.cycle(batches):
            model(**batch)
            elapsed = _now(batch) - start
            sequences += len(batch["attention_mask"])
            tokens += int(batch["attention_mask"].sum())
            if elapsed >= seconds:
                break
    model.train(training)
    return {"sequences_per_second": sequences / elapsed, "tokens_per_second": tokens / elapsed}


def _now(batch: Batch) -> float:
    if batch["attention_mask"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
