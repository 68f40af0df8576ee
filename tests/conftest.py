"""What all tests share: Triton's interpreter where there is no GPU, and the fixtures of the loss tests."""

import os
from collections.abc import Iterator

import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it under deterministic algorithms
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
torch.set_num_threads(1)  # the tensors are small: threads that wait for each other make gradcheck four times slower


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "chunked", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["chunked", "triton"])
def fused(request: pytest.FixtureRequest) -> str:
    """The implementations whose gradients are written by hand."""
    return request.param


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fresh buffers hold NaN (torch.utils.deterministic.fill_uninitialized_memory), so an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
