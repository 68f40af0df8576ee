"""Memory linear in the number of tokens, by the allocations that PyTorch's profiler records, inside ops too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from loss_cases import Case, build, evaluate
from torch.profiler import ProfilerActivity, profile


class Memory(NamedTuple):
    peak: int  # bytes above what was held before
    largest: int  # bytes of the largest single allocation


def memory(run: Callable[[], object], trace: Path) -> Memory:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        kept = run()
    del kept
    profiler.export_chrome_trace(str(trace))
    on_device = 1 if torch.cuda.is_available() else 0
    events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events = [e for e in events if e["Device Type"] == on_device]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return Memory(max(e["Total Allocated"] for e in events) - before, max(e["Bytes"] for e in events))


def test_chunked_stays_under_a_tenth_of_the_reference(device: str, tmp_path: Path) -> None:
    n = 4096
    inputs = build(Case(id="long", n=n, teacher=(1, 1, 8), student=(1, 1, 8), relations=("qk",)), device)
    reference = memory(lambda: evaluate(inputs, "reference"), tmp_path / "reference.json")
    assert reference.largest >= n * n * 4  # the measure sees a float32 matrix of scores
    for relation in ("qk", "vv"):
        inputs.options["relations"] = (relation,)
        chunked = memory(lambda: evaluate(inputs, "chunked"), tmp_path / f"{relation}.json")
        assert chunked.peak < reference.peak / 10


@pytest.mark.parametrize("case", [
    Case(id="plain", n=256, teacher=(1, 1, 4), student=(1, 1, 4)),
    Case(id="holes, causal", n=256, teacher=(1, 1, 4), student=(1, 1, 4), masks=("holes",), causal=True),
    Case(id="packed", n=256, teacher=(1, 1, 4), student=(1, 1, 4), packed=(0, 250)),
], ids=lambda case: case.id)  # fmt: skip
def test_triton_allocates_no_matrix(case: Case, device: str, tmp_path: Path) -> None:
    """All that the call holds at once is less than N·N bytes, a matrix of the smallest type."""
    inputs = build(case, device)
    triton = memory(lambda: evaluate(inputs, "triton"), tmp_path / "triton.json")
    reference = memory(lambda: evaluate(inputs, "reference"), tmp_path / "reference.json")
    assert reference.largest >= case.n**2 * 4
    assert triton.peak < case.n**2


def test_chunked_grows_with_the_length_and_not_its_square(device: str, tmp_path: Path) -> None:
    def peak(n: int) -> int:
        inputs = build(Case(id=f"{n}", n=n, teacher=(1, 1, 8), student=(1, 1, 8)), device)
        return memory(lambda: evaluate(inputs, "chunked"), tmp_path / f"{n}.json").peak

    assert peak(2048) < 2.5 * peak(1024)
