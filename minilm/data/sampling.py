"""The order in which an epoch visits indexed data: a function of (seed, epoch) alone.

Neither torch's nor numpy's global generator is read or advanced, so a run resumed in a later epoch sees the order that
it would have seen. (transformers' LengthGroupedSampler draws from torch's.)
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from minilm.errors import UsageError

MEGA_BATCH = 50  # batches that are sorted by length together, as in transformers' LengthGroupedSampler


class EpochSampler(Sampler[int]):
    """A permutation of 0 .. size - 1, another one in each epoch.

    With `lengths` it is grouped: a random permutation is cut into mega-batches of 50 batches (fewer in small data),
    each sorted by length and cut into batches, whose order within the mega-batch is random again.

    Args:
        size: of the data.
        seed: not negative.
        lengths: (size,) tokens of each sequence.
        batch_size: for grouping, the sequences that are visited at one time: those of a micro-batch, on all ranks
            together, so that ranks which take their batches in turn get sequences of similar lengths.

    Raises:
        ValueError: as many lengths as sequences there must be; a batch size below 1.
    """

    def __init__(self, size: int, seed: int, *, lengths: Sequence[int] | None = None, batch_size: int = 1) -> None:
        if lengths is not None and len(lengths) != size:
            raise UsageError(f"there are {len(lengths)} lengths for {size} sequences")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        self.size = size
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.batch_size = batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of; the Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(self.size)
        if self.lengths is not None:
            order = self._grouped(order, generator)
        yield from order.tolist()

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        assert self.lengths is not None
        batches = max(1, min(MEGA_BATCH, self.size // (4 * self.batch_size)))  # four mega-batches at least
        parts = []
        for start in range(0, self.size, batches * self.batch_size):
            mega_batch = order[start : start + batches * self.batch_size]
            longest_first = mega_batch[np.argsort(-self.lengths[mega_batch], kind="stable")]
            whole = len(mega_batch) // self.batch_size
            split = longest_first[: whole * self.batch_size].reshape(whole, self.batch_size)
            parts += [generator.permutation(split).ravel(), longest_first[whole * self.batch_size :]]
        return np.concatenate(parts) if parts else order
