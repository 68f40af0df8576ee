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
def hopper() -> list[dict[str, str]]:
    """Compiled for sm_90 at two pairs of dimensions, without and with a mask."""
    dimensions = ((64, 32), (16, 8))
    variants = [("sm_90", kernel, *d, masked) for d in dimensions for masked in (False, True) for kernel in KERNELS]
    return compile_all(variants)


@pytest.mark.parametrize("kernel", LIMITS)
def test_main_loop_stays_within_its_instructions(hopper: list[dict[str, str]], kernel: str) -> None:
    row = next(row for row in hopper if row["kernel"] == kernel)  # the first are of dimensions 64 and 32, unmasked
    issue, exponentials = LIMITS[kernel]
    assert 0 < float(row["issue"]) <= issue
    assert 1.9 <= float(row["exponentials"]) <= exponentials


def test_hopper_uses_its_tensor_cores(hopper: list[dict[str, str]]) -> None:
    assert [row["tensor_instruction"] for row in hopper] == ["HGMMA"] * 4 * len(KERNELS)


def test_hopper_spills_nothing(hopper: list[dict[str, str]]) -> None:
    assert spilling(hopper) <= {("rows", "64", "True")}  # a few in its masked tail, see kernels/README.md


@pytest.fixture(scope="module", params=["sm_80", "sm_89", "sm_100"])
def other_chip(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return compile_all([(request.param, kernel, 64, 32, True) for kernel in KERNELS])


def test_other_chips_use_their_tensor_cores(other_chip: list[dict[str, str]]) -> None:
    assert all(row["tensor_instruction"] for row in other_chip)


def test_other_chips_spill_nothing(other_chip: list[dict[str, str]]) -> None:
    assert spilling(other_chip) == set()


def test_amd_compiles() -> None:
    rows = compile_all([("gfx942", kernel, 64, 32, True) for kernel in KERNELS])
    assert [row["kernel"] for row in rows] == list(KERNELS)
    assert all(int(row["shared_bytes"]) <= 65536 for row in rows)
