#!/usr/bin/env python3
"""The fused loss, forward and backward, once a case between profiler start and stop: what Nsight Compute looks at.

ncu --profile-from-start off --clock-control none --set detailed python bench/profile_kernels.py
"""

import torch
from _cases import make_inputs, select_cases
from _exact import outcome
from _providers import fused

CASES = ("v1-384", "v2-48")
LENGTHS = (128, 512, 2048)


def main() -> None:
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


if __name__ == "__main__":
    main()
