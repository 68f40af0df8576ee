"""What all tests share: Triton's interpreter where there is no GPU, and fixtures of the loss and the command line."""

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

# On some CPUs numpy's product of A and B differs in its last bits from that of Bᵀ and Aᵀ, which on a GPU it does not;
# the interpreter multiplies with numpy. Read when torch imports numpy.
os.environ["OPENBLAS_CORETYPE"] = "Prescott"
os.environ["OMP_NUM_THREADS"] = "1"  # numpy's threads, and those of the processes that tests start
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it under deterministic algorithms
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub, and asking in vain takes many seconds
torch.set_num_threads(1)  # the tensors are small: threads that wait for each other make gradcheck four times slower

if importlib.util.find_spec("hypothesis"):  # which a GPU machine may lack
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "short", max_examples=40, derandomize=True, deadline=None, database=None,
        phases=[Phase.explicit, Phase.generate],  # to find a smaller case takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    settings.register_profile(
        "long", settings.get_profile("short"), max_examples=5000, derandomize=False,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )  # fmt: skip
    settings.load_profile("short")


def pytest_collection_finish() -> None:
    """The Trainer collects garbage whenever it begins: what the imports have made need not be looked through again."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else nanobind takes it for leaked


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


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of one rank, in this process."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process where Triton is no interpreter and its kernels are compiled for sm_80."""
    yield from calls_of_process(80)


@pytest.fixture(scope="session")
def compiled_for_hopper() -> Iterator[Callable[..., Any]]:
    """`compiled`, for sm_90."""
    yield from calls_of_process(90)


def calls_of_process(architecture: int) -> Iterator[Callable[..., Any]]:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which is for Linux")
    import compiled

    with ProcessPoolExecutor(1, get_context("spawn"), compiled.start, (architecture,)) as process:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)
            process.submit(int).result()  # starts it
        yield lambda function, *args: process.submit(function, *args).result()


CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """The folder of a tiny BERT."""
    from tiny_text import save_teacher  # here and below: most tests need no transformers

    return str(save_teacher(tmp_path / "teacher"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A file of forty lines."""
    from tiny_text import write_lines

    return str(write_lines(tmp_path / "lines.txt"))


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    """Runs `minilm-train` in a folder of its own; gives (exit code, stdout, stderr without bars)."""
    import datasets

    from minilm.cli import main

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minilm.cli.distill.SPEED_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()  # of the fixtures
        try:
            code = main(list(argv))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    yield run
    datasets.enable_progress_bars()
