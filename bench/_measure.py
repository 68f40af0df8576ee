"""Time and peak memory of a piece of work, on a GPU and on a CPU. Every benchmark measures through this file.

On CUDA: `triton.testing.do_bench`, which clears the second-level cache before each run and times with events; short
work is replayed as a CUDA graph, or Python would be timed. On a CPU: seven runs by the wall clock.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

QUANTILES = (0.2, 0.5, 0.8)
REPEATS = 7  # at least, on CUDA; exactly, on a CPU
REP_MS = 100.0  # how long do_bench repeats on CUDA, where that is more than REPEATS runs
CACHE_BYTES = 256 << 20  # written before a run so that nothing of the last one is left in the second-level cache
MIB = 1 << 20


def _nothing() -> None:
    return None


class Work(NamedTuple):
    """`run(prepare())`, of which only `run` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = _nothing


class Timing(NamedTuple):
    """Milliseconds of one run: quantiles over the runs."""

    p20: float
    p50: float
    p80: float


def time_ms(works: Sequence[Work], device: str, *, graph: bool = False, rep_ms: float = REP_MS) -> list[Timing]:
    """Quantiles of the time of each `work.run`, warmed up; with `graph` (CUDA) as replays of a CUDA graph.

    On a CPU the works take turns, so that whatever else the machine does slows all of them.
    """
    if device != "cuda":
        return _time_cpu(works)
    return [_time_cuda(work, graph, rep_ms) for work in works]


def _time_cuda(work: Work, graph: bool, rep_ms: float) -> Timing:
    work.run(work.prepare())
    if graph:
        work = captured(work)
    once = _time_events(work, count=1)[0]
    count = max(REPEATS, int(rep_ms / once))
    # do_bench cannot leave `prepare` untimed, and runs long work seven times beside the runs that it counts.
    if work.prepare is not _nothing or count == REPEATS:
        return _quantiles(_time_events(work, count))
    from triton.testing import do_bench

    return Timing(*do_bench(lambda: work.run(None), rep=rep_ms, quantiles=list(QUANTILES)))


def _time_events(work: Work, count: int) -> list[float]:
    """As do_bench times: cache cleared, nothing waited for until all runs are launched."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        prepared = work.prepare()
        cache.zero_()
        start.record()
        work.run(prepared)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def captured(work: Work) -> Work:
    """The same work as replays of CUDA graphs, one for what is timed and one for what is not."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first calls on a stream allocate workspaces, which a capture must not
        work.run(work.prepare())
    torch.cuda.current_stream().wait_stream(stream)
    # Backward runs on the stream of its forward, so both are captured on one.
    pool = torch.cuda.graph_pool_handle()
    replay_prepare: Callable[[], Any] = _nothing
    prepared = None
    if work.prepare is not _nothing:
        first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(first, pool=pool, stream=stream):
            prepared = work.prepare()
        replay_prepare = first.replay
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second, pool=pool, stream=stream):
        work.run(prepared)
    return Work(lambda _: second.replay(), replay_prepare)


def _time_cpu(works: Sequence[Work]) -> list[Timing]:
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(REPEATS + 1):  # the first is for warming up
        for work, milliseconds in zip(works, times, strict=True):
            prepared = work.prepare()
            start = time.perf_counter()
            result = work.run(prepared)
            end = time.perf_counter()
            del result, prepared
            if repeat:
                milliseconds.append((end - start) * 1e3)
    return [_quantiles(milliseconds) for milliseconds in times]


def _quantiles(times: Sequence[float]) -> Timing:
    return Timing(*torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double()).tolist())


def peak_mib(work: Work, device: str) -> float:
    """Largest sum of live allocations during `prepare` and `run`, above what was held before; results included.

    Of work that ran before (`time_ms`): what a first call sets up and keeps is no part of it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.run(work.prepare())
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / MIB
    from torch.profiler import ProfilerActivity, profile

    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = work.run(work.prepare())
    del result
    # Not `profiler.events()`: those leave out what is allocated inside ops.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / MIB


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """PyTorch's profiler writes two lines to file descriptor 2 at every start and stop, past Python."""
    sys.stderr.flush()
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def release(device: str) -> None:
    """Give freed memory back, so that one provider's leftovers do not run another out of memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
