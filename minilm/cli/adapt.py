"""What a run changes in its training arguments once teacher and data are known, and what they cannot have then."""

from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from minilm.cli.inputs import Inputs
from minilm.data.streams import TextStream
from minilm.errors import UsageError


def adapt(training: TrainingArguments, inputs: Inputs, teacher: PreTrainedModel, *, evaluate_untrained: bool) -> None:
    """Sets the training arguments to what the inputs and the teacher need, in place.

    Args:
        evaluate_untrained: whether the student's losses before training are measured, as the report needs them.

    Raises:
        ValueError: all sequences together are dropped as an incomplete batch.
    """
    _check_a_batch(training, inputs.train, inputs.heldout)
    takes_images = teacher.main_input_name == "pixel_values"
    is_stream = isinstance(inputs.train, TextStream)
    training.eval_on_start = evaluate_untrained
    training.dataloader_pin_memory &= training.device.type != "cpu"  # where it does nothing but warn
    if takes_images:
        training.remove_unused_columns = False  # pixels are made of the column "image" when it is read
    if is_stream:
        training.ignore_data_skip = True  # the stream goes on by itself from where it was
    if takes_images or is_stream:  # images have one size; a stream has its own order
        training.train_sampling_strategy = "random"


def _check_a_batch(training: TrainingArguments, train: Any, heldout: Any) -> None:
    if not training.dataloader_drop_last:
        return
    batch = training.train_batch_size * training.world_size
    if not isinstance(train, TextStream) and len(train) < batch:
        raise UsageError(f"dataloader_drop_last drops all {len(train)} sequences: they make no batch of {batch}")
    batch = training.eval_batch_size * training.world_size
    if len(heldout) < batch:
        raise UsageError(
            f"dataloader_drop_last drops all {len(heldout)} held-out sequences: they make no batch of {batch}; leave "
            "it out or lower --per_device_eval_batch_size"
        )
