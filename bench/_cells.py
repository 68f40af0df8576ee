"""The model of a cell: trained by the command line, by sentence-transformers, or taken as it is."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _experiments import EMBEDDINGS, ENDS, LAYERS, LEARNING_RATES, STARTS, STUDENTS, SYSTEMS, Cell
from transformers import AutoModel, AutoTokenizer

from minilm.models.embeddings import sentence_files
from minilm.models.students import Init, build_student
from minilm.training.runs import METRICS

HERE = Path(__file__).resolve().parent
MAX_LENGTH, BATCH = 64, 32
SAVED_EVERY = 100  # steps


@dataclass(frozen=True)
class Sources:
    """Where everything comes from."""

    teacher: str
    head: str | None  # the teacher with its masked-LM head
    data: str
    work: Path


def make(cell: Cell, sources: Sources) -> str:
    """The name or folder of the cell's model; one that is there already is not made again.

    Raises:
        RuntimeError: the run failed, with the last line that it wrote.
    """
    folder = sources.work / cell.name
    way = SYSTEMS[cell.system].way
    if way == "teacher":
        return sources.teacher
    if way == "train":
        if not (folder / METRICS).exists():
            _run([sys.executable, "-m", "minilm.cli", *training_flags(cell, sources)], folder)
    elif not (folder / "model.safetensors").exists():
        if way == "sentence-transformers":
            layers, [distance] = STARTS[cell.start][1], SYSTEMS[cell.system].flags
            values = (sources.teacher, sources.data, folder, layers, distance, cell.steps, cell.seed)
            _run([sys.executable, str(HERE / "_embed_distill.py"), *map(str, values)], folder)
        else:
            _save_start(cell, sources.teacher, folder)
    return str(folder)


def training_flags(cell: Cell, sources: Sources) -> list[str]:
    """What `minilm-train` is told."""
    system = SYSTEMS[cell.system]
    values = {
        "teacher": sources.head if system.head else sources.teacher,
        "data": sources.data,
        "output_dir": sources.work / cell.name,
        "max_length": MAX_LENGTH,
        "max_steps": cell.steps,
        "seed": cell.seed,
        "learning_rate": LEARNING_RATES[cell.start],
        "per_device_train_batch_size": BATCH,
        "save_steps": SAVED_EVERY,
        "save_total_limit": 1,
        "resume_from_checkpoint": "auto",
        "disable_tqdm": True,
        "report_to": "none",
    }
    flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    precision = ["--bf16"] if system.bf16 else []
    device = [] if torch.cuda.is_available() else ["--use_cpu"]
    return [*flags, *STUDENTS[cell.student].flags, *STARTS[cell.start], *system.flags, *precision, *device]


def _run(command: Sequence[str], folder: Path) -> None:
    """With its output in a log beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{lines[-1] if lines else 'no output'} (exit code {code}, {log})")


def _save_start(cell: Cell, teacher: str, folder: Path) -> None:
    """What a run of this start and seed would train, untrained; of the control without layers the embeddings alone."""
    whole: Any = AutoModel.from_pretrained(teacher)
    if cell.system == EMBEDDINGS:
        whole.encoder.layer = torch.nn.ModuleList()
        whole.config.num_hidden_layers = 0
        student = whole
    else:
        named = [int(layer) for layer in STARTS[cell.start][1].split(",")] if cell.start in (LAYERS, ENDS) else None
        init: Init = "layers" if named else cell.start  # type: ignore[assignment]
        sizes = STUDENTS[cell.student]._asdict()
        student = build_student(whole, **sizes, init=init, teacher_layers=named, seed=cell.seed)
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    if (sentences := sentence_files(teacher)) and student.config.hidden_size == whole.config.hidden_size:
        sentences.copy_to(folder)
