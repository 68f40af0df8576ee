"""One case, several providers, three modes: checked against float64, measured, and written down whatever happens."""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _cases import DTYPES, Case, Inputs, as_leaves
from _exact import Outcome, is_wrong, outcome, rel_error
from _floor import Rates, floor_ms
from _measure import REP_MS, REPEATS, Work, peak_mib, release, time_ms
from _providers import PROVIDERS, Loss
from _results import LossRow
from _table import OUT_OF_MEMORY

GRAPH_LENGTH = 512  # up to here a CUDA graph is replayed; beyond it the kernels take longer than Python
ORDER = ("both", "forward", "backward")  # what matters most first, should the time be short


@dataclass
class _Job:
    row: LossRow
    dtype: str  # in which the provider computes
    loss: Loss
    inputs: Inputs
    work: Work


def compare(
    case: Case,
    names: Sequence[str],
    inputs: Inputs,
    truth: Outcome,
    device: str,
    rates: Rates | None = None,
    rep_ms: float = REP_MS,
    deadline: float = math.inf,
) -> Iterator[list[LossRow]]:
    """Rows of one mode at a time: of all providers on a CPU, where they take turns, of one after the other on CUDA.

    What does not run, or runs out of memory, or is wrong, says so in its note. Ends early where the next measurement
    would begin after `deadline` (of `time.monotonic`), or on a CPU end after it.
    """
    graph = device == "cuda" and case.n <= GRAPH_LENGTH
    for group in [[name] for name in names] if device == "cuda" else [names]:
        release(device)
        jobs = [job for name in group for job in _jobs(case, name, inputs, device, rates)]
        for mode in ORDER:
            if time.monotonic() >= deadline:
                return
            chosen = [job for job in jobs if job.row.mode == mode]
            start = time.monotonic()
            for job in chosen:
                job.row.note = job.row.note or attempt(partial(_check, job, truth, device))
            # Checking is two calls. (On CUDA the first one compiles, and says nothing about the others.)
            needed = (time.monotonic() - start) * (REPEATS + 1) / 2
            if device != "cuda" and time.monotonic() + needed > deadline:
                return
            running = [job for job in chosen if not job.row.note]
            note = attempt(partial(_time, running, device, graph, rep_ms)) if running else ""
            for job in running:
                assert job.row.rel_error is not None  # as `_check` said nothing
                job.row.note = note or ("WRONG" if is_wrong(job.row.rel_error, mode, job.dtype) else "")
            release(device)
            yield [job.row for job in chosen]


def _jobs(case: Case, name: str, inputs: Inputs, device: str, rates: Rates | None) -> list[_Job]:
    provider = PROVIDERS[name]
    sizes = {"B": case.batch, "heads": case.heads, "N": case.n, "d_t": case.d_t, "d_s": case.d_s}
    relations = "+".join(case.relations)
    common: dict[str, Any] = {"case": case.name, "relations": relations, **sizes, "dtype": case.dtype, "provider": name}
    note = provider.refuses(case, device)
    dtype = provider.dtype or case.dtype
    converted = _convert(inputs, dtype)
    loss = provider.make(case, device)
    return [
        _Job(
            LossRow(**common, mode=mode, note=note, floor_ms=rates and floor_ms(case, mode, rates)),
            dtype,
            loss,
            converted,
            _work(loss, converted, mode),
        )
        for mode in ORDER
    ]


def _convert(inputs: Inputs, dtype: str) -> Inputs:
    q, k, v = (x.to(DTYPES[dtype]) for x in inputs.teacher)
    return Inputs((q, k, v), as_leaves(inputs.student, DTYPES[dtype]), inputs.mask)


def _work(loss: Loss, inputs: Inputs, mode: str) -> Work:
    """What is timed in a mode."""
    if mode == "backward":
        return Work(lambda value: torch.autograd.grad(value, inputs.student), prepare=lambda: loss(*inputs))
    return Work(lambda _: _result(loss, inputs, mode))


def _result(loss: Loss, inputs: Inputs, mode: str) -> Outcome:
    if mode != "forward":
        return outcome(loss, inputs)
    with torch.no_grad():
        return Outcome(loss(*inputs), ())


def _check(job: _Job, truth: Outcome, device: str) -> None:
    """Error and memory; also the first call, in which things are compiled and set up."""
    job.row.rel_error = rel_error(_result(job.loss, job.inputs, job.row.mode), truth, job.row.mode)
    job.row.peak_mib = peak_mib(job.work, device)


def _time(jobs: Sequence[_Job], device: str, graph: bool, rep_ms: float) -> None:
    for job, timing in zip(jobs, time_ms([job.work for job in jobs], device, graph=graph, rep_ms=rep_ms), strict=True):
        job.row.ms_p20, job.row.ms_p50, job.row.ms_p80 = timing


def attempt(run: Callable[[], None]) -> str:
    """Empty, or why it did not end. Whatever a provider raises is its row's matter; the run goes on."""
    try:
        run()
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except Exception as error:
        if "DefaultCPUAllocator: can't allocate memory" in str(error):
            return OUT_OF_MEMORY
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""
