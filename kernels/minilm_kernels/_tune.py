"""The door to tuning; what it does is in `_triton/_tune.py`, so that Triton is imported only when it is used."""

from collections.abc import Callable


def tune(call: Callable[[], object]) -> dict[str, tuple[int | None, ...]]:
    """Runs `call` with every candidate of tiles and keeps the fastest for calls like it, in this process.

    Args:
        call: a step on the GPU as it will be run, such as `lambda: fused_minilm_loss(...).backward()`. The gradients
            that it leaves behind are meaningless: clear them.

    Returns:
        (rows, keys, warps, stages, most registers of a thread or None) of each kernel, dimensions, length and dtype
        that was new.

    The pinned tiles, which serve without this, give the same bits in every process; tuned ones may not.
    """
    from minilm_kernels._triton._tune import tune as tune_kernels

    return dict(tune_kernels(call))
