"""What a model is worth as it is: frozen probes of `minilm.evaluation` on three tasks.

MRPC is none of them: of frozen vectors its F1 is 72 for the teacher and 78 for its embeddings alone, so that it does
not tell better models from worse.
"""

from pathlib import Path

from minilm.evaluation.encoders import Encoder
from minilm.evaluation.probes import probe
from minilm.evaluation.task_data import TaskData, read_task
from minilm.evaluation.tasks import TASKS

TRAIN_RECORDS, MAX_LENGTH = 5_000, 128


def read_tasks(folder: Path) -> list[TaskData]:
    """STS-B (Spearman of cosines), TREC and SST-2 (accuracy of linear probes), from folders of files."""
    return [
        read_task(TASKS[name], folder).with_train_records(TRAIN_RECORDS, seed=0) for name in ("stsb", "trec", "sst2")
    ]


def scores(model: str, tasks: list[TaskData]) -> dict[str, float]:
    """Task -> its first metric on its first split, times 100."""
    encoder = Encoder(model, MAX_LENGTH)
    found = {}
    for data in tasks:
        first = next(iter(probe(encoder.encode, data).values()))
        found[data.task.name] = first[data.task.metrics[0]]
    return found
