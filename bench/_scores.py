"""What a model is worth as it is: frozen probes of `minilm.evaluation` on four tasks."""

from pathlib import Path

from minilm.evaluation.encoders import Encoder
from minilm.evaluation.probes import probe
from minilm.evaluation.task_data import TaskData, read_task
from minilm.evaluation.tasks import TASKS, Task

TREC = Task("trec", "classification", ("text",), "coarse_label", ("accuracy",), ("test",))
TRAIN_RECORDS, MAX_LENGTH = 5_000, 128


def read_tasks(folder: Path) -> list[TaskData]:
    """STS-B (Spearman of cosines), TREC, MRPC and SST-2 (of linear probes accuracy, or F1), from folders of files."""
    tasks = (TASKS["stsb"], TREC, TASKS["mrpc"], TASKS["sst2"])
    return [read_task(task, folder).with_train_records(TRAIN_RECORDS, seed=0) for task in tasks]


def scores(model: str, tasks: list[TaskData]) -> dict[str, float]:
    """Task -> its first metric on its first split, times 100."""
    encoder = Encoder(model, MAX_LENGTH)
    found = {}
    for data in tasks:
        first = next(iter(probe(encoder.encode, data).values()))
        found[data.task.name] = first[data.task.metrics[0]]
    return found
