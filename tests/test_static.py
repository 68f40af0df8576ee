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
LIMITS = {"rows": (17.0, 2.35), "keys": (8.5, 2.0), "self": (12.0, 2.05), "forward": (14.5, 2.1)}
KERNELS = (*LIMITS, "resident")


def compile_all(variants: list[tuple[str, str, int, int, bool]]) -> list[dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = "\n".join(" ".join(map(str, variant)) for variant in variants)
    run = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(run, input=lines, cwd=BENCH, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))


@pytest.fixture(scope="module")
def hopper() -> dict[str, dict[str, str]]:
    return {row["kernel"]: row for row in compile_all([("sm_90", kernel, 64, 32, False) for kernel in KERNELS])}


@pytest.mark.parametrize("kernel", KERNELS)
def test_hopper_uses_its_tensor_cores_and_spills_nothing(hopper: dict[str, dict[str, str]], kernel: str) -> None:
    assert hopper[kernel]["tensor_instruction"] == "HGMMA"
    assert int(hopper[kernel]["spills"]) == 0


@pytest.mark.parametrize("kernel", LIMITS)
def test_main_loop_stays_within_its_instructions(hopper: dict[str, dict[str, str]], kernel: str) -> None:
    issue, exponentials = LIMITS[kernel]
    assert 0 < float(hopper[kernel]["issue"]) <= issue
    assert 1.9 <= float(hopper[kernel]["exponentials"]) <= exponentials


def test_relation_heads_and_masks_do_not_spill_on_hopper() -> None:
    rows = compile_all([("sm_90", kernel, 16, 8, bounded) for kernel in KERNELS for bounded in (False, True)])
    assert {row["kernel"]: row["spills"] for row in rows if int(row["spills"])} == {}


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_100"])
def test_other_chips_compile_without_spills(target: str) -> None:
    rows = compile_all([(target, kernel, 64, 32, True) for kernel in KERNELS])
    assert {row["kernel"]: row["spills"] for row in rows if int(row["spills"])} == {}
    assert all(row["tensor_instruction"] for row in rows)


def test_amd_compiles() -> None:
    rows = compile_all([("gfx942", kernel, 64, 32, True) for kernel in KERNELS])
    assert [row["kernel"] for row in rows] == list(KERNELS)
    assert all(int(row["shared_bytes"]) <= 65536 for row in rows)
