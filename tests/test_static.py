"""The pinned tiles against compiled machine code, with no GPU: spills, tensor cores, instructions per element.

Compiled in a process of its own, because under Triton's interpreter kernels cannot be.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
PROGRAM = """
import csv, sys
from dataclasses import asdict, fields
import torch
from static_report import Row, Variant, measure
writer = csv.DictWriter(sys.stdout, [field.name for field in fields(Row)])
writer.writeheader()
for target, kernel, d_t, d_s, bounded in (line.split() for line in sys.stdin):
    variant = Variant(kernel, int(d_t), int(d_s), torch.bfloat16, bounded == "True")
    writer.writerow(asdict(measure(target, variant)))
"""
# Instructions and exponentials per element of the unmasked main loop on sm_90 at d_T = 64, d_S = 32.
LIMITS = {
    "rows": (17.0, 2.1),
    "keys": (10.5, 2.0),
    "self": (15.0, 2.0),
    "forward": (13.0, 2.0),
    "resident": (25.5, 2.15),
}
KERNELS = tuple(LIMITS)
# Loads and stores of local memory on sm_90, by kernel and teacher's dimension. Fewer registers than would hold
# everything let more programs share a multiprocessor: on an H200 that was faster (kernels/README.md). Nothing else may.
SPILLS = {
    ("rows", "64"): 48,
    ("rows", "16"): 16,
    ("self", "64"): 32,
    ("self", "16"): 12,
    ("forward", "64"): 4,
    ("resident", "64"): 16,
    ("resident", "16"): 340,
}


def compile_all(variants: list[tuple[str, str, int, int, bool]]) -> list[dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = "\n".join(" ".join(map(str, variant)) for variant in variants)
    run = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(run, input=lines, cwd=BENCH, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))


def spilling(rows: list[dict[str, str]]) -> set[tuple[str, str, str]]:
    """Kernel, teacher's dimension and whether it is masked, of those that spill."""
    return {(row["kernel"], row["d_t"], row["bounded"]) for row in rows if int(row["spills"])}


def excess(rows: list[dict[str, str]]) -> dict[tuple[str, str], int]:
    """Spills beyond what is allowed."""
    spills = {(row["kernel"], row["d_t"]): int(row["spills"]) for row in rows}
    return {which: count for which, count in spills.items() if count > SPILLS.get(which, 0)}


@pytest.fixture(scope="module")
def unmasked() -> list[dict[str, str]]:
    return compile_all([("sm_90", kernel, 64, 32, False) for kernel in LIMITS])


def test_main_loop_stays_within_its_instructions(unmasked: list[dict[str, str]]) -> None:
    assert [row["tensor_instruction"] for row in unmasked] == ["HGMMA"] * len(LIMITS)
    assert excess(unmasked) == {}
    for (kernel, (issue, exponentials)), row in zip(LIMITS.items(), unmasked, strict=True):
        assert 0 < float(row["issue"]) <= issue, kernel
        assert 1.9 <= float(row["exponentials"]) <= exponentials, kernel


def test_wide_heads_and_those_of_128_dimensions() -> None:
    limits = {("rows", 128): (21.0, 150), ("forward", 512): (40.0, 16), ("wide", 512): (61.0, 20)}
    rows = compile_all([("sm_90", kernel, dim, dim, bounded) for kernel, dim in limits for bounded in (False, True)])
    for row, (issue, spills) in zip(rows, [limit for limit in limits.values() for _ in range(2)], strict=True):
        assert 0 < float(row["issue"]) <= issue, row
        assert float(row["exponentials"]) <= 2.1, row
        assert int(row["spills"]) <= spills, row


def test_main_loop_loads_ahead_of_use() -> None:
    """Of heads of 8 dimensions too, whose stride is no multiple of 16: a load into registers waits where it stands."""
    rows = compile_all([("sm_90", kernel, 16, 8, False) for kernel in LIMITS])
    assert [(row["kernel"], float(row["loads"])) for row in rows] == [(kernel, 0.0) for kernel in LIMITS]
    assert excess(rows) == {}


# With a mask a kernel holds the most. Ada gets Ampere's tiles and instructions: of it the kernels with most registers.
MASKED = {
    "Ampere and Ada": [("sm_80", kernel, 64, 32) for kernel in KERNELS]
    + [("sm_89", kernel, 64, 32) for kernel in ("rows", "forward")],
    "Hopper": [("sm_90", kernel, *d) for d in ((64, 32), (16, 8)) for kernel in KERNELS],
    "Blackwell": [("sm_100", kernel, 64, 32) for kernel in KERNELS],
}


@pytest.mark.parametrize("chips", MASKED)
def test_masked_kernels_use_tensor_cores_and_spill_nothing(chips: str) -> None:
    rows = compile_all([(*variant, True) for variant in MASKED[chips]])
    assert [row["kernel"] for row in rows] == [kernel for _, kernel, *_ in MASKED[chips]]
    if chips == "Hopper":
        assert {row["tensor_instruction"] for row in rows} == {"HGMMA"}
        assert excess(rows) == {}
    else:
        assert all(row["tensor_instruction"] for row in rows)
        assert spilling(rows) == set()


def test_amd_compiles() -> None:
    rows = compile_all([("gfx942", kernel, 64, 32, True) for kernel in KERNELS])
    assert [row["kernel"] for row in rows] == list(KERNELS)
    assert all(int(row["shared_bytes"]) <= 65536 for row in rows)
