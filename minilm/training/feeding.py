"""A Trainer's data: in which order they come, and where each process's stream stands in a checkpoint."""

import inspect
from functools import lru_cache
from typing import Any

from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from minilm.data.sampling import EpochSampler
from minilm.data.streams import TextStream
from minilm.errors import UsageError
from minilm.models.batches import FOR_THE_LOSS
from minilm.training.saving import SavingTrainer


class FeedingTrainer(SavingTrainer):
    """A Trainer whose resumed runs draw what they would have drawn, from streams too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._stream_states: dict[int, dict[str, Any]] = {}  # by reader, after the last batch taken from it

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Of map-style data: seeded by seed and epoch alone, so that a resumed run draws what it would have drawn."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = _lengths(dataset) if strategy == "group_by_length" else None
        together = self.args.train_batch_size * self.args.world_size
        return EpochSampler(len(dataset), seed=seed, lengths=lengths, batch_size=together)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of a stream its own: accelerate's would have every process read everything."""
        if isinstance(self.train_dataset, TextStream):
            return self.train_dataset.loader(pin_memory=self.args.dataloader_pin_memory)
        return super().get_train_dataloader()

    def rank_state(self) -> dict[str, Any]:
        """Where this process's stream stands: the state of each reader after the last batch taken from it."""
        return {"stream": list(self._stream_states.values())} if self._stream_states else {}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """Takes back what `rank_state` gave."""
        if not isinstance(self.train_dataset, TextStream):
            raise UsageError("the checkpoint is of a run on a stream, and the data of this run are none")
        self._stream_states = {reader["reader"]: reader for reader in state["stream"]}
        self.train_dataset.load_state(state["stream"])

    def note_stream_states(self, states: list[dict[str, Any]]) -> None:
        """Takes down where the readers stood after batches that are about to be trained on."""
        self._stream_states |= {state["reader"]: state for state in states}

    def bad_records(self) -> int:
        """Rows of the stream that could not be read and were passed over, by all processes; each is counted once."""
        if not isinstance(self.train_dataset, TextStream):
            return 0
        own = sum(state.get("bad", 0) for state in self._stream_states.values())
        of_all: list[int] = gather_object([own])
        return self.train_dataset.heldout_bad + sum(of_all)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer asks the wrapper's forward, whose inputs are the student's.
        if self._signature_columns is None:
            parameters = inspect.signature(self.student.forward).parameters
            self._signature_columns = [*parameters, *FOR_THE_LOSS, "lengths"]  # type: ignore[assignment]


@lru_cache(maxsize=1)  # the trial before training asks too
def _lengths(dataset: Any) -> list[int]:
    """Tokens of every row, read from the table without decoding rows one by one."""
    return [len(ids) for ids in dataset.with_format(None)["input_ids"]]
