"""The pinned tiles against compiled machine code, with no GPU: no spills, tensor cores, instructions per element.

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
import torch
from static_report import Row, Variant, measure
writer = csv.writer(sys.stdout)
writer.writerow(Row._fields)
for target, kernel, d_t, d_s, bounded in (line.split() for line in sys.stdin):
    variant = Variant(kernel, int(d_t), int(d_s), torch.bfloat16, bounded == "True")
    writer.writerow(measure(target, variant))
"""
# Instructions and exponentials per element of the unmasked main loop on sm_90 at d_T = 64, d_S = 32.
LIMITS = {
    "rows": (17.0, 2.35),
    "keys": (8.5, 2.0),
    "self": (12.0, 2.05),
    "forward": (14.5, 2.1),
    "resident": (25.0, 2.1),
}
KERNELS = tuple(LIMITS)


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


@pytest.fixture(scope="module")
def unmasked() -> list[dict[str, str]]:
    return compile_all([("sm_90", kernel, 64, 32, False) for kernel in LIMITS])


def test_main_loop_stays_within_its_instructions(unmasked: list[dict[str, str]]) -> None:
    assert [row["tensor_instruction"] for row in unmasked] == ["HGMMA"] * len(LIMITS)
    for (kernel, (issue, exponentials)), row in zip(LIMITS.items(), unmasked, strict=True):
        assert 0 < float(row["issue"]) <= issue, kernel
        assert 1.9 <= float(row["exponentials"]) <= exponentials, kernel


def test_main_loop_spills_nothing(unmasked: list[dict[str, str]]) -> None:
    assert spilling(unmasked) == set()


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
        assert spilling(rows) <= {("rows", "64", "True")}  # a few in its masked tail, see kernels/README.md
    else:
        assert all(row["tensor_instruction"] for row in rows)
        assert spilling(rows) == set()


def test_amd_compiles() -> None:
    rows = compile_all([("gfx942", kernel, 64, 32, True) for kernel in KERNELS])
    assert [row["kernel"] for row in rows] == list(KERNELS)
    assert all(int(row["shared_bytes"]) <= 65536 for row in rows)
