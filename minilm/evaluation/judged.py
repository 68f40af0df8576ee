"""A model that is judged: what it is called, loaded as it is, its size, its speed and how it is told from others."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minilm.data.fingerprints import fingerprint_files
from minilm.evaluation.task_data import TaskData
from minilm.models.batches import Batch
from minilm.models.configs import read_config
from minilm.models.speed import measure_speed
from minilm.models.students import count_parameters
from minilm.models.teachers import check_complete, check_weights, loading, quiet, resolve_length

TEXTS, BATCH, ROUNDS, SECONDS = 256, 32, 3, 1.0
_NOT_THE_MODEL = ("metrics.json", "eval.json", "trainer_state.json", ".minilm.json")


def fingerprint_model(name: str) -> str:
    """A digest of the weights, config, tokenizer and sentence files of a folder; else the hub's revision."""
    folder = Path(name)
    if folder.is_dir():
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_of_the_model(path)]
        inner = [path for path in sorted(folder.glob("[0-9]_*/*")) if path.is_file()]
        return fingerprint_files([*files, *inner])
    with loading("model", name):
        config = read_config(name)
    return str(config._commit_hash)


def _is_of_the_model(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt") and path.name not in _NOT_THE_MODEL


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in float32 and its tokenizer.

    Raises:
        UsageError: nothing that loads there, or weights that are not the model's.
    """
    with loading("model", name), quiet():
        model, info = AutoModel.from_pretrained(
            name,
            config=read_config(name),
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # of which the loading report tells, in place of an error without sizes
        )
    with loading("model", name):
        check_complete("model", name, (key for key in info["missing_keys"] if not key.startswith("pooler.")))
        check_weights("model", name, model, info)
        with loading("model", name, "tokenizer"), quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def size_of(name: str) -> dict[str, int]:
    """{"embedding", "transformer", "total"}: parameters of the base model. Raises `UsageError` as `load_model`."""
    return count_parameters(load_model(name)[0])


def device_name() -> str:
    """What the models run on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"a CPU with {threads} thread{'s' * (threads > 1)}"


@dataclass(frozen=True)
class Timed:
    """A model with texts to be timed on."""

    model: PreTrainedModel
    batches: Sequence[Batch]


def some_texts(tasks: Iterable[TaskData], seed: int = 0) -> list[tuple[str, ...]]:
    """TEXTS records that are scored, texts or pairs, drawn evenly from the tasks."""
    draw = random.Random(seed)
    every = list(tasks)
    return [_text(draw.choice(every), draw) for _ in range(TEXTS)]


def _text(data: TaskData, draw: random.Random) -> tuple[str, ...]:
    split = next(iter(data.evaluated.values()))
    record = split[draw.randrange(len(split))]
    texts = [record[column] for column in data.task.texts]
    return tuple(" ".join(text) if isinstance(text, list) else text for text in texts)


def to_be_timed(name: str, texts: Sequence[tuple[str, ...]], max_length: int) -> Timed:
    """The model on its device, with the texts in batches of BATCH of like lengths."""
    model, tokenizer = load_model(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = min(max_length, resolve_length(model, tokenizer, None))
    rows = sorted(
        (tokenizer(*text, truncation=True, max_length=length) for text in texts), key=lambda x: len(x["input_ids"])
    )
    batches = [
        tokenizer.pad(rows[start : start + BATCH], return_tensors="pt").to(device)
        for start in range(0, len(rows), BATCH)
    ]
    return Timed(model.to(device), [dict(batch) for batch in batches])  # type: ignore[arg-type]


def texts_per_second(models: Sequence[Timed]) -> list[float]:
    """Of each, the median of ROUNDS measurements, in which the models take turns: what slows the machine slows all."""
    rounds = [
        [measure_speed(timed.model, timed.batches, SECONDS)["sequences_per_second"] for timed in models]
        for _ in range(ROUNDS)
    ]
    return [sorted(speeds)[ROUNDS // 2] for speeds in zip(*rounds, strict=True)]
