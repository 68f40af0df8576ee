"""Edges of size: addresses beyond 32 bits, many programs, many heads, a long sequence in little memory.

Nothing here needs as much memory as its addresses span: a sparse file holds the tensors, of which a page exists once it
is written to. Of many programs the interpreter runs the last.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loss_cases import Case, Inputs, build, check, evaluate
from torch import Tensor

from minilm_kernels._triton._launch import Launch

MIDDLE = 2**31  # elements before the tensors, so that an offset that wraps around reads zeros


def vast(size: int, dtype: torch.dtype, device: str, folder: Path) -> Tensor:
    """So many zeros, which take memory where they are written to."""
    if device == "cuda":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_file(str(folder / "zeros"), shared=True, size=size, dtype=dtype)


STRIDED = {
    "tokens, on chip": (Case(id="far", n=20, teacher=(1, 1, 8), student=(1, 1, 8)), 2, 2**27 + 8),
    "tokens, sweeps": (
        Case(id="far", n=40, teacher=(1, 1, 8), student=(1, 1, 8), relations=("qk", "kk")),
        2,
        2**26 + 8,
    ),
    "tokens, wide": (Case(id="far", n=40, teacher=(1, 1, 130), student=(1, 1, 130), relations=("qk", "kk")), 2, 2**26),
    "dimensions": (Case(id="far", n=20, teacher=(1, 1, 8), student=(1, 1, 8)), 3, 2**29),
}


@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("name", STRIDED)
def test_offsets_within_a_tile_beyond_32_bits(name: str, whose: str, fused: str, device: str, tmp_path: Path) -> None:
    """The stride fits into 32 bits, its product with the last token or dimension of a tile does not."""
    case, axis, stride = STRIDED[name]
    inputs = build(case, device)
    side = getattr(inputs, whose)
    shape = side[0].shape
    strides = list(side[0].stride())
    strides[axis] = stride
    if axis == 3:
        strides[2] = 1
    apart = math.prod(shape[2:])  # between q, k and v
    places = vast(MIDDLE + stride * shape[axis] + 3 * apart, side[0].dtype, device, tmp_path)
    far = tuple(places.as_strided(shape, strides, MIDDLE + i * apart) for i in range(3))
    for x, there in zip(side, far, strict=True):
        there.copy_(x)
    actual = evaluate(inputs._replace(**{whose: far}), fused)
    expected = evaluate(inputs, fused)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=0)
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(g, g_expected, rtol=1e-5, atol=1e-9)


@pytest.fixture
def last_programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the interpreter run so many programs of a launch, the last ones; a GPU runs all."""

    def only(count: int) -> None:
        if torch.cuda.is_available():
            return
        from triton.runtime.interpreter import interpreter_builder

        set_dim, set_place = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

        def run(launch: Launch, device: torch.device) -> None:
            before = launch.schedule.programs - count
            with monkeypatch.context() as patch:
                patch.setattr(interpreter_builder, "set_grid_dim", lambda *_: set_dim(launch.schedule.programs, 1, 1))
                patch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: set_place(before + x, y, z))
                launch.schedule.kernel[(count,)](**launch.arguments, **launch.schedule.options)

        monkeypatch.setattr(Launch, "run", run)

    return only


@pytest.mark.parametrize("relation", ["qk", "vv"])
@pytest.mark.parametrize(("length", "programs"), [(20, 2), (70, 4)])  # on chip, sweeps; of the last two heads
def test_tensors_beyond_32_bits_and_grids_beyond_65535(
    length: int, programs: int, relation: str, device: str, tmp_path: Path, last_programs: Callable[[int], None]
) -> None:
    """So many heads that q, k and v have more than 2^31 numbers, and so do their gradients and the softmax sums."""
    end = Case(id="end", n=length, teacher=(2, 2, 1), student=(2, 2, 1), dtypes=(torch.bfloat16,) * 2, reduction="sum")
    inputs = build(end, device)
    inputs.options["relations"] = (relation,)
    expected = evaluate(inputs, "triton")
    heads = 2**31 // length + 3
    shape = 1, heads, length, 1
    places = vast((heads + 2 * 6) * length, torch.bfloat16, device, tmp_path)
    many = [places[i * 2 * length :][: heads * length].view(shape) for i in range(6)]  # their last heads lie apart
    for x, of_two in zip(many, (*inputs.teacher, *inputs.student), strict=True):
        x[:, -2:] = of_two
    last_programs(programs)
    actual = evaluate(Inputs(tuple(many[:3]), tuple(many[3:]), inputs.options), "triton")
    for g, g_expected in zip(actual.gradients, expected.gradients, strict=True):
        assert g is g_expected or torch.equal(g[:, -2:], g_expected)
        assert g is None or g_expected.ne(0).any()


def test_thousands_of_heads(device: str) -> None:
    case = Case(
        id="heads",
        n=3,
        batch=2,
        teacher=(64, 64, 64),
        student=(32, 32, 128),
        relation_heads=4096,
        masks=("full", "left"),
    )
    check(case, "chunked", device)


LONG = """
import torch
from loss_cases import Case, build, evaluate

def most_held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
inputs = build(Case(id="32k", n=32_768, teacher=(1, 1, 4), student=(1, 1, 4), relations=("qk",), causal=True), "cpu")
evaluate(build(Case(id="short", n=64), "cpu"), "chunked")
before = most_held()
gradient = evaluate(inputs, "chunked").gradients[0][0, 0, 32_000:32_100]
print(most_held() - before)
x_t, y_t, x_s, y_s = (x[0, 0].double() for x in (*inputs.teacher[:2], *inputs.student[:2]))
later = torch.arange(32_768) > torch.arange(32_000, 32_100)[:, None]
q, p = ((x[32_000:32_100] @ y.T / 2).masked_fill(later, -torch.inf).softmax(1) for x, y in ((x_s, y_s), (x_t, y_t)))
exact = (q - p) @ y_s / 2 / 32_768
print(((gradient - exact).norm() / exact.norm()).item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_thirty_two_thousand_tokens_on_a_cpu() -> None:
    """A matrix of scores would take 4 GiB."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", LONG], env=environment, capture_output=True, text=True, check=True)
    kib, error = map(float, done.stdout.split())
    assert kib < 64 * 1024
    assert error < 1e-5
