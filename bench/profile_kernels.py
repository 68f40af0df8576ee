#!/usr/bin/env python3
"""Forward and backward of the fused loss, once a case between profiler start and stop, for Nsight Compute to look at.

    ncu --profile-from-start off --clock-control none --set detailed python bench/profile_kernels.py

The cases are v1-384 and v2-48 at 128, 512 and 2048 tokens. The first call of each, which compiles, is left out.
"""

import sys
from collections.abc import Sequence

import torch
from _arguments import make_parser
from _cases import make_inputs, select_cases
from _exact import outcome
from _providers import fused

CASES = ("v1-384", "v2-48")
LENGTHS = (128, 512, 2048)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 without a GPU."""
    make_parser(__doc__).parse_args(argv)
    if not torch.cuda.is_available():
        print("this machine has no CUDA device: there is no kernel to profile", file=sys.stderr)
        return 2
    for case in select_cases(True, CASES, LENGTHS):
        inputs = make_inputs(case, "cuda")
        loss = fused(case, "cuda")
        outcome(loss, inputs)  # compiles
        torch.cuda.synchronize()
        print(case, flush=True)
        torch.cuda.profiler.start()
        outcome(loss, inputs)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
