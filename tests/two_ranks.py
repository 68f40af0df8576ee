"""The same steps in one micro-batch, in two, and on two ranks of three each."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Step = Callable[[Path, int, int], None]  # its folder, batch and accumulation


def whole_halves_and_ranks(script: str, folder: Path, steps: Step) -> list[Path]:
    """The folders that the three leave.

    Args:
        script: a file of this folder that gives its arguments, folder, batch and accumulation, to `steps`.
        steps: takes them on twelve sequences.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [str(Path(__file__).parent / script), str(folder / "ranks"), "2", "3"]
    subprocess.run([*launch, *argv], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name, batch, accumulation in (("whole", 12, 1), ("halves", 6, 2)):
        steps(folder / name, batch, accumulation)
    return [folder / name for name in ("whole", "halves", "ranks")]
