"""Rows of measurements: where and when they were made, their CSV files, in which a new row replaces its old one."""

import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
Row = TypeVar("Row", bound="DataclassInstance")


def environment(device: str, commit: str | None = None) -> dict[str, str]:
    """The columns that say where and when: gpu (or the CPU and its threads), versions, commit, date."""
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = ""
    gpu = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit or this_commit(),
        "date": date,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def this_commit() -> str:
    """The short hash, "-dirty" where code differs from it; "unknown" outside of git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        dirty = _git("status", "--porcelain", "--", "kernels", "minilm", "bench", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "-dirty" * bool(dirty)


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def device_slug(device: str) -> str:
    """The device in a file name: "h200", "geforce-rtx-4090", "cpu"."""
    if device != "cuda":
        return device
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


@dataclass(kw_only=True)
class LossRow:
    """One mode of one provider on one case. None and "" are empty in the file."""

    case: str
    relations: str
    B: int
    heads: int
    N: int
    d_t: int
    d_s: int
    dtype: str  # of the inputs
    provider: str
    mode: str
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    peak_mib: float | None = None  # above the inputs
    floor_ms: float | None = None
    pct_of_floor: float | None = None
    speedup_vs_eager: float | None = None
    speedup_vs_compile: float | None = None
    rel_error: float | None = None  # against float64
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""  # why there is no time, or that the result is wrong

    @property
    def setting(self) -> tuple[Any, ...]:
        """What the providers of a comparison have in common."""
        sizes = (self.relations, self.B, self.heads, self.N, self.d_t, self.d_s, self.dtype)
        return (self.case, *sizes, self.mode, self.gpu)

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self.setting, self.provider)


@dataclass(kw_only=True)
class StepRow:
    """A whole distillation step of one student with one provider of the loss."""

    student: str  # layers x hidden size
    objective: str
    provider: str
    B: int
    N: int
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    tokens_per_s: float | None = None
    loss_pct: float | None = None  # forward and backward of the loss alone, of ms_p50
    peak_mib: float | None = None  # above both models and the optimiser's state
    largest_batch: int | None = None  # sequences that fit, to an eighth
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.student, self.objective, self.provider, self.B, self.N, self.gpu)


def replace(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """Old and new rows, of two with one key the new, in the old one's place."""
    return list({row.key: row for row in [*old, *new]}.values())


def merge(old: Sequence[LossRow], new: Sequence[LossRow]) -> list[LossRow]:
    """Old rows replaced by new, with the ratios between the providers that then stand together."""
    rows = replace(old, new)
    times = {row.key: row.ms_p50 for row in rows if row.ms_p50}
    for row in rows:
        row.pct_of_floor = 100 * row.floor_ms / row.ms_p50 if row.floor_ms and row.ms_p50 else None
        for provider in ("eager", "compile"):
            other = times.get((*row.setting, provider))
            setattr(row, f"speedup_vs_{provider}", other / row.ms_p50 if other and row.ms_p50 else None)
    return rows


def read_csv(row_type: type[Row], path: Path) -> list[Row]:
    """Rows of a file that `write_csv` wrote, none where there is none. Raises `ValueError` if its columns differ."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        types = {field.name: field.type for field in fields(row_type)}
        if reader.fieldnames != list(types):
            raise ValueError(f"{path} has columns {reader.fieldnames}, this version writes {list(types)}: move it away")
        return [row_type(**{name: _parse(type_, row[name]) for name, type_ in types.items()}) for row in reader]


def _parse(type_: Any, text: str) -> Any:
    if text == "" and type_ is not str:
        return None
    [bare] = {*(get_args(type_) or [type_])} - {NoneType}
    return text == "True" if bare is bool else bare(text)


def old_rows(row_type: type[Row], path: Path) -> list[Row]:
    """As `read_csv`, for a command that will write there: wrong columns end it with one line and exit code 2."""
    try:
        return read_csv(row_type, path)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def write_csv(rows: Sequence[Any], path: Path, digits: int = 5) -> None:
    """All rows, at least one. The file is written under another name and then renamed: it is never half of it.

    Args:
        digits: of floats, significant ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    os.replace(aside, path)
