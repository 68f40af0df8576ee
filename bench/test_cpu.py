"""Forward and backward of the loss on a CPU: the chunked path beside eager PyTorch.

pytest bench/test_cpu.py -n 0 --benchmark-only --benchmark-group-by=param:n
"""

from typing import Any

import pytest
from _cases import make_inputs, select_cases
from _exact import outcome
from _providers import PROVIDERS


@pytest.mark.parametrize("provider", ["fused", "eager"])
@pytest.mark.parametrize("n", [128, 512])
def test_forward_and_backward(benchmark: Any, n: int, provider: str) -> None:
    [case] = select_cases(False, ["v1-384"], [n])
    inputs = make_inputs(case, "cpu")
    loss = PROVIDERS[provider].make(case, "cpu")
    benchmark.pedantic(outcome, (loss, inputs), rounds=7, warmup_rounds=1)
