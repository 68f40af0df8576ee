#!/usr/bin/env python3
"""Everything that a GPU machine is needed for, in one command: tests, sanitizer, benchmarks, profile.

    python bench/run_gpu.py --out DIR                 all parts
    python bench/run_gpu.py --out DIR --part bench    one; each ends within nine minutes

tests: the loss's tests on the GPU. sanitize: compute-sanitizer's memcheck and racecheck over the kernels' tests. bench:
loss_bench.py. step: step_bench.py and truncation_bench.py. profile: Nsight Compute over the kernels. Rows and plots go
into bench/results/, where new rows replace old ones. Copies of them and a log of each part go into DIR. The project
need not be installed: its sources are found beside this file.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from _arguments import add_commit, make_parser
from _results import RESULTS, ROOT, device_slug

PART_SECONDS = 530  # a part is ended then, whatever it does
MEASURE_SECONDS = 450  # a benchmark starts nothing new after this
PARTS = ("tests", "sanitize", "bench", "step", "profile")
NEEDS = {  # of the parts that PyTorch alone does not bring: the tool, and what is left undone without it
    "sanitize": ("compute-sanitizer", "no kernel was checked"),
    "profile": ("ncu", "no kernel was profiled"),
}
# Without pyproject.toml's options, which need pytest-xdist, and without pytest-benchmark, which before 5.3 warns beside
# workers; warnings are errors here.
PYTEST = ("-m", "pytest", "-q", "-ra", "-o", "addopts=", "-p", "no:benchmark")
SANITIZED = (
    "test_loss_on_chip.py",
    "test_loss_masks.py",
    "test_loss_packed.py",
)  # all structures and patterns, few tokens
NCU = ("ncu", "--profile-from-start", "off", "--clock-control", "none", "--set", "detailed", "--force-overwrite")


def commands(part: str, out: Path, commit: str | None) -> list[list[str]]:
    """What a part runs, one after the other."""
    python, bench = sys.executable, ROOT / "bench"
    options = ["--out", str(RESULTS), "--seconds", str(MEASURE_SECONDS), *(["--commit", commit] if commit else [])]
    if part == "tests":
        files = [*(ROOT / "tests").glob("test_loss_*.py"), ROOT / "tests" / "test_outputs.py"]
        # Natively on CUDA where there is one, and most of the time is the compiler's, on the CPU.
        workers = str(min(16, os.cpu_count() or 1))
        parallel = ["-n", workers] if importlib.util.find_spec("xdist") else []
        return [[python, *PYTEST, *parallel, *sorted(map(str, files))]]
    if part == "sanitize":
        # A tensor that has memory of its own shows what is read beside it; of the cached blocks of PyTorch it does not.
        test = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", python, *PYTEST, "-k", "not reference and not chunked"]
        test += [str(ROOT / "tests" / name) for name in SANITIZED]
        check = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool"]
        return [[*check, tool, *test] for tool in ("memcheck", "racecheck")]
    if part == "bench":
        return [[python, str(bench / "loss_bench.py"), *options]]
    if part == "step":
        commit_option = ["--commit", commit] if commit else []
        return [
            [python, str(bench / "step_bench.py"), *options],
            [python, str(bench / "truncation_bench.py"), "--out", str(RESULTS), *commit_option],
        ]
    report = str(out / "kernels.ncu-rep")
    return [
        [*NCU, "--export", report, python, str(bench / "profile_kernels.py")],
        ["ncu", "--import", report, "--page", "details", "--print-summary", "per-kernel"],
    ]


def run_part(part: str, out: Path, commit: str | None) -> bool:
    """Whether all of its commands ended with 0; their output goes to the terminal and to DIR/<part>.log."""
    tool, undone = NEEDS.get(part, (None, ""))
    if tool and shutil.which(tool) is None:
        print(f"{part}: {tool} was not found on this machine; {undone}")
        return True
    deadline = time.monotonic() + PART_SECONDS
    with (out / f"{part}.log").open("w") as log:
        return all(run(command, log, deadline - time.monotonic()) for command in commands(part, out, commit))


def run(command: list[str], log: TextIO, seconds: float) -> bool:
    """Whether it ended with 0 in time; after `seconds` it is killed with everything it started."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    print("$", *command, flush=True)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, to be killed as one
    ) as process:
        timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        code = process.wait()
        timer.cancel()
    if code == -signal.SIGKILL:
        print(f"killed, after at most {seconds:.0f} s", flush=True)
    return code == 0


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a part failed; 2 without a GPU."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the logs and copies")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, metavar="NAME", help=", ".join(PARTS))
    add_commit(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this machine has no CUDA device; on a CPU: pytest, and python bench/loss_bench.py", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ended = {part: run_part(part, out, args.commit) for part in args.part}
    copy_results(RESULTS, out, device_slug("cuda"))
    for part, well in ended.items():
        print(f"{part}: {'ended well' if well else 'FAILED, see ' + str(out / f'{part}.log')}")
    return int(not all(ended.values()))


def copy_results(results: Path, out: Path, slug: str) -> list[Path]:
    """Copies this device's tables and plots; returns the copies."""
    if out == results:
        return []
    patterns = (f"*_bench_{slug}.csv", f"*_bench_{slug}_*.png", f"truncation_{slug}.csv")
    return [Path(shutil.copy2(file, out)) for pattern in patterns for file in sorted(results.glob(pattern))]


if __name__ == "__main__":
    sys.exit(main())
