"""The benchmarks' own logic, on a CPU: cases, floors, what providers compute, failures, tables, files."""

import csv
import importlib.util
import io
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import BertConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import _attention
import _compare
import _exact
import _launches
import _measure
import _results
import loss_bench
import profile_kernels
import run_gpu
import static_report
import step_bench
import systems_bench
import tile_bench
import truncation_bench
from _cases import FAMILIES, Case, Triple, as_leaves, make_inputs, select_cases
from _exact import exact, is_wrong, outcome, rel_error
from _floor import Rates, floor_ms
from _measure import Work, peak_mib, time_ms
from _plots import plot
from _providers import PROVIDERS, Provider, default_providers, eager
from _results import LossRow, merge, read_csv, write_csv
from _table import loss_table, ratios

from minilm import fused_minilm_loss
from minilm_kernels._triton._launch import Launch
from minilm_kernels._triton._plan import architecture

# Small cases; d_T + d_S is no multiple of 8, and a length no multiple of a block.
SMALL = Case(name="v1-384", relations=("qk", "vv"), batch=3, heads=2, n=21, d_t=12, d_s=6, dtype="fp32")
SMALL_CASES = {
    "full": SMALL,
    "padded": replace(SMALL, padded=True),
    "causal": replace(SMALL, causal=True),
    "self relations": replace(SMALL, relations=("qq", "kk", "vv")),
}
H200 = Rates(bytes=4.3e12, flops=790e12, exps=132 * 16 * 1.98e9)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work on many threads takes longest where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpu_case(name: str, n: int) -> Case:
    [case] = select_cases(True, [name], [n])
    return case


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("relations", "name", "n", "microseconds"),
    [
        (("qk",), "v1-384", 128, 24),  # rows on chip
        (("qk",), "v1-384", 512, 96),  # forward+dX, dY
        (("qk",), "v1-384", 2048, 385),
        (("vv",), "v1-384", 512, 96),  # forward, rank-1
        (("qq", "kk", "vv"), "v2-48", 128, 144),
        (("qq", "kk", "vv"), "v2-48", 512, 1156),
    ],
)
def test_floors_of_an_h200(relations: tuple[str, ...], name: str, n: int, microseconds: float) -> None:
    """Worked out beforehand, for 16,384 tokens."""
    floor = floor_ms(replace(gpu_case(name, n), relations=relations), "both", H200)
    assert floor * 1e3 == pytest.approx(microseconds, rel=0.02)


def test_floor_of_each_unit() -> None:
    """One launch, forward only: N = 4, d_T = d_S = 16, two sequences of one head, float32."""
    case = replace(SMALL, relations=("qk",), batch=2, heads=1, n=4, d_t=16, d_s=16)
    never = math.inf
    rows, elements = 8, 32
    inputs = rows * 2 * (16 + 16) * 4
    assert floor_ms(case, "forward", Rates(1.0, never, never)) == 1e3 * (inputs + rows * 4)
    assert floor_ms(case, "forward", Rates(never, 1.0, never)) == 1e3 * elements * (2 * 16 + 2 * 16)
    assert floor_ms(case, "forward", Rates(never, never, 1.0)) == 1e3 * elements * 2
    assert floor_ms(case, "both", Rates(never, never, 1.0)) == 1e3 * elements * 2
    assert floor_ms(case, "backward", Rates(never, never, 1.0)) is None
    assert floor_ms(replace(case, n=256), "backward", Rates(never, never, 1.0)) == 1e3 * 2 * 256**2 * 2
    rows = 2 * 256
    traffic = rows * 2 * (16 + 16) * 4 + rows * 8 + rows * 16 * 4  # inputs, lse of both, one side's gradient
    assert floor_ms(replace(case, n=256), "backward", Rates(1.0, never, never)) == 1e3 * traffic
    narrow = replace(case, d_s=8)  # costs a product as much as 16
    assert floor_ms(narrow, "forward", Rates(never, 1.0, never)) == 1e3 * elements * (2 * 16 + 2 * 16)


def test_cases() -> None:
    cases = select_cases(True)
    assert {case.name for case in cases} == set(FAMILIES)
    assert all(case.tokens == 16384 for case in cases if not case.padded and case.name != "v1-sst2")
    assert {(case.d_t, case.d_s) for case in cases if case.name == "v2-64"} == {(16, 6)}
    # Heads of 64 dimensions, padding, the causal mask and each dtype are measured without a flag.
    assert {(case.heads, case.d_t, case.d_s) for case in cases if case.name == "v1-768"} == {(12, 64, 64)}
    assert {(case.dtype, case.n) for case in cases if case.padded or case.causal} == {("bf16", 512), ("bf16", 2048)}
    assert [(case.name, case.dtype, case.n) for case in cases if case.dtype != "bf16"] == [
        ("v1-384", dtype, n) for dtype in ("fp16", "fp32") for n in (512, 2048)
    ]
    assert {case.dtype for case in select_cases(True, ["v1-384"])} == {"bf16"}
    assert {case.dtype for case in select_cases(True, dtype="fp16")} == {"fp16"}
    assert {case.dtype for case in select_cases(True, quick=True)} == {"bf16"}
    assert [case.n for case in select_cases(False, quick=True)] == [128, 512]
    [own] = select_cases(True, ["v2-48"], [1000], batch=3, heads=12, dtype="fp16")
    assert (own.n, own.batch, own.heads, own.d_t, own.d_s, own.dtype) == (1000, 3, 12, 64, 32, "fp16")
    for heads in (7, 256):  # 256 divides the teacher's width
        with pytest.raises(ValueError, match=f"--heads {heads} does not divide the widths 768 and 384 of v1-384"):
            select_cases(True, ["v1-384"], heads=heads)


def test_padded_and_causal_cases_cost_what_is_allowed() -> None:
    full, padded = gpu_case("v1-384", 2048), gpu_case("v1-384-padded", 2048)
    assert padded.lengths == [256 * i for i in range(1, 9)]
    assert padded.pairs / full.pairs == pytest.approx(0.4, abs=0.01)
    assert gpu_case("v1-384-causal", 2048).pairs == full.batch * sum(range(1, 2049))
    mask = make_inputs(SMALL_CASES["padded"], "cpu").mask
    assert mask.sum(1).tolist() == SMALL_CASES["padded"].lengths == [7, 14, 21]
    assert mask[:, 0].all()


@pytest.mark.parametrize("name", SMALL_CASES)
def test_exact_is_the_loop_in_float64(name: str) -> None:
    case = SMALL_CASES[name]
    inputs = make_inputs(case, "cpu")
    teacher: Any = tuple(x.double() for x in inputs.teacher)
    wide = inputs._replace(teacher=teacher, student=as_leaves(inputs.student, torch.float64))
    # The loop takes its softmax in float32.
    assert rel_error(outcome(PROVIDERS["loop"].make(case, "cpu"), wide), exact(case, inputs), "both") < 1e-5
    assert rel_error(outcome(eager(case, "cpu"), wide), exact(case, inputs), "both") < 1e-12


def test_exact_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SMALL_CASES["padded"], "cpu")
    whole = exact(SMALL_CASES["padded"], inputs)
    monkeypatch.setattr("_exact.ELEMENTS", 1)
    assert rel_error(exact(SMALL_CASES["padded"], inputs), whole, "both") < 1e-14


REFUSED = {
    "flash": {"padded": "flash attention takes no padding mask"},
    "flex": dict.fromkeys(SMALL_CASES, "FlexAttention has no gradients on a CPU"),
    "liger": dict.fromkeys(SMALL_CASES, "Liger Kernel runs on a GPU"),
}


@pytest.mark.parametrize("name", SMALL_CASES)
@pytest.mark.parametrize("provider_name", PROVIDERS)
def test_providers_compute_the_loss(name: str, provider_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **kw: compile_function(*a, **kw, backend="aot_eager"))
    case, provider = SMALL_CASES[name], PROVIDERS[provider_name]
    inputs = make_inputs(case, "cpu")
    if reason := REFUSED.get(provider_name, {}).get(name):
        assert provider.refuses(case, "cpu") == reason
        return
    assert provider.refuses(case, "cpu") == ""
    assert rel_error(outcome(provider.make(case, "cpu"), inputs), exact(case, inputs), "both") < 1e-5


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, block_mask: BlockMask | None, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """FlexAttention with all of it in memory, and with gradients on a CPU; rows that see nothing as it gives them."""
    assert return_lse
    assert query.shape[-1] >= 16
    scores = scale * query @ key.mT
    if block_mask is not None:
        places = [
            torch.arange(size).view(-1, *[1] * dims) for size, dims in zip(scores.shape, (3, 2, 1, 0), strict=True)
        ]
        scores = scores.masked_fill(~block_mask.mask_mod(*places), -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.detach().clamp(min=-1e30)[..., None]).exp()
    return weights / weights.detach().sum(-1, keepdim=True).clamp(min=1e-30) @ value, lse


@pytest.mark.parametrize("name", SMALL_CASES)
def test_flex_computes_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention that has gradients on a CPU in FlexAttention's place."""
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **kw: compile_function(*a, **kw, backend="aot_eager"))
    monkeypatch.setattr(_attention, "flex_attention", dense_attention)
    case, flex = SMALL_CASES[name], PROVIDERS["flex"]
    inputs = make_inputs(case, "cpu")
    assert flex.refuses(case, "cuda") == ""
    assert rel_error(outcome(flex.make(case, "cpu"), inputs), exact(case, inputs), "both") < 1e-5


@pytest.mark.parametrize("name", [name for name in SMALL_CASES if name != "padded"])
def test_liger_computes_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's divergence, which has its interface, in Liger Kernel's place."""
    module = SimpleNamespace(LigerKLDIVLoss=torch.nn.KLDivLoss)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=module))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    case, liger = SMALL_CASES[name], PROVIDERS["liger"]
    inputs = make_inputs(case, "cpu")
    assert rel_error(outcome(liger.make(case, "cpu"), inputs), exact(case, inputs), "both") < 1e-5


def test_peers_refuse_what_they_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = PROVIDERS["liger"].refuses
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refuses(SMALL, "cuda") == "liger-kernel is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert refuses(SMALL, "cuda") == ""
    assert refuses(SMALL_CASES["padded"], "cuda") == "Liger Kernel weighs all rows alike, padding too"


def test_flash_refuses_what_its_kernel_does_not_take() -> None:
    refuses = PROVIDERS["flash"].refuses
    assert refuses(gpu_case("v1-384", 512), "cuda") == ""
    assert refuses(SMALL, "cuda") == "flash attention takes bf16 and fp16"
    assert refuses(replace(SMALL, d_t=128, d_s=136), "cpu").endswith("up to 256, not 264")


def test_gradients_in_float16_are_compared_under_a_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it eager code counts as wrong for gradients of 1e-6, which float16 can hardly hold."""
    [case] = select_cases(False, ["v2-48"], [128], dtype="fp16")
    inputs = make_inputs(case, "cpu")
    truth = exact(case, inputs)
    assert not is_wrong(rel_error(outcome(eager(case, "cpu"), inputs), truth, "both"), "both", "fp16")
    monkeypatch.setattr(_exact, "LOSS_SCALE", 1.0)
    assert is_wrong(rel_error(outcome(eager(case, "cpu"), inputs), truth, "both"), "both", "fp16")


def test_errors_are_seen() -> None:
    inputs = make_inputs(SMALL, "cpu")
    truth = exact(SMALL, inputs)
    value, (dq, dk, dv) = outcome(eager(SMALL, "cpu"), inputs)
    wrong_gradient = truth._replace(gradients=(dq, 1.5 * dk, dv))
    assert rel_error(wrong_gradient, truth, "backward") == pytest.approx(0.5, rel=1e-4)
    assert rel_error(wrong_gradient, truth, "forward") == 0
    assert rel_error(truth._replace(loss=2 * value), truth, "both") == pytest.approx(1, rel=1e-4)
    assert rel_error(truth._replace(loss=2 * value), truth, "backward") == 0
    assert math.isnan(rel_error(truth._replace(gradients=(dq, dk * math.nan, dv)), truth, "both"))
    assert [is_wrong(error, "both", "bf16") for error in (0.04, 0.06, math.nan, math.inf)] == [False, True, True, True]
    assert [is_wrong(error, "forward", "bf16") for error in (0.004, 0.006)] == [False, True]


def test_providers_by_default() -> None:
    assert default_providers(SMALL, cuda=False, quick=False) == ["fused", "eager"]
    assert default_providers(gpu_case("v2-48", 512), cuda=True, quick=False) == list(PROVIDERS)
    compiled = {"compile", "flex"}
    assert not compiled & {*default_providers(gpu_case("v2-48", 2048), cuda=True, quick=False)}
    assert not compiled & {*default_providers(gpu_case("v2-48", 512), cuda=True, quick=True)}


def test_what_is_compiled_is_measured_last() -> None:
    first, second = gpu_case("v2-48", 128), gpu_case("v2-48", 2048)
    compiled = ["compile", "flex"]
    jobs = loss_bench.schedule([first, second], [*compiled, "fused"], cuda=True, quick=False)
    assert jobs == [(first, ["fused"]), (second, ["fused"]), (first, compiled), (second, compiled)]


class _Fails(torch.autograd.Function):
    """The identity, whose backward runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def _around(change: Any) -> Provider:
    """A provider that does something to eager's loss."""

    def make(case: Case, device: str) -> Any:
        def loss(teacher: Triple, student: Triple, mask: Tensor | None) -> Tensor:
            return change(eager(case, device)(teacher, student, mask))

        return loss

    return Provider(make)


def _breaks(value: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nsecond line")


def test_failures_stay_in_their_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, change in {
        "hungry": _Fails.apply,
        "host memory": lambda value: torch.empty(1 << 60) and value,
        "broken": _breaks,
        "wrong": lambda value: 1.2 * value,
        "nan": lambda value: value * math.nan,
    }.items():
        monkeypatch.setitem(PROVIDERS, name, _around(change))
    monkeypatch.setitem(PROVIDERS, "refusing", Provider(eager, refuses=lambda case, device: "not here"))
    inputs = make_inputs(SMALL, "cpu")
    names = ["hungry", "host memory", "broken", "wrong", "nan", "refusing", "eager"]
    measured = [row for new in _compare.compare(SMALL, names, inputs, exact(SMALL, inputs), "cpu", H200) for row in new]
    rows = {(row.provider, row.mode): row for row in merge([], measured)}
    notes = {name: [rows[name, mode].note for mode in ("forward", "backward", "both")] for name in names}
    assert notes == {
        "hungry": ["", "out of memory", "out of memory"],
        "host memory": ["out of memory"] * 3,
        "broken": ["failed: RuntimeError: no such kernel"] * 3,
        "wrong": ["WRONG"] * 3,
        "nan": ["WRONG"] * 3,
        "refusing": ["not here"] * 3,
        "eager": [""] * 3,
    }
    assert rows["hungry", "forward"].ms_p50 > 0
    assert rows["hungry", "both"].ms_p50 is None
    assert rows["hungry", "both"].speedup_vs_eager is None
    assert rows["wrong", "both"].rel_error == pytest.approx(0.2, rel=1e-3)
    assert rows["eager", "both"].speedup_vs_eager == 1
    assert rows["eager", "both"].pct_of_floor == pytest.approx(
        100 * floor_ms(SMALL, "both", H200) / rows["eager", "both"].ms_p50
    )
    assert "no such kernel" in capsys.readouterr().err

    table = loss_table(list(rows.values()))
    lines = {line.split()[0]: line for line in table.splitlines() if line.startswith("  ") and line.strip()}
    assert "OOM" in lines["hungry"]
    assert lines["hungry"].endswith("out of memory")
    assert lines["wrong"].endswith("WRONG")
    assert "nan" in lines["nan"].split()[1:]
    assert "x compile" not in table


def row(provider: str, ms: float | None, n: int = 512, mode: str = "both", **changes: Any) -> LossRow:
    sizes = {"B": 4, "heads": 12, "N": n, "d_t": 64, "d_s": 32}
    common = {"case": "v1-384", "relations": "qk+vv", **sizes, "dtype": "bf16", "gpu": "some GPU"}
    return LossRow(**{**common, "provider": provider, "mode": mode, "ms_p50": ms, "peak_mib": 1.0, **changes})


def test_running_again_replaces_rows_and_ratios(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.csv"
    assert read_csv(LossRow, path) == []
    first = [row("fused", 1.0, floor_ms=0.5), row("eager", 20.0), row("eager", 3.0, gpu="another GPU")]
    write_csv(merge([], first), path)
    again = [row("fused", 2.0, floor_ms=0.5), row("compile", 5.0), row("eager", 30.0, n=128)]
    write_csv(merge(read_csv(LossRow, path), again), path)
    with path.open() as file:
        header, *lines = csv.reader(file)
    assert ",".join(header[:-1]) == (
        "case,relations,B,heads,N,d_t,d_s,dtype,provider,mode,ms_p20,ms_p50,ms_p80,peak_mib,floor_ms,pct_of_floor,"
        "speedup_vs_eager,speedup_vs_compile,rel_error,gpu,torch,triton,commit,date"
    )
    assert len(lines) == 5
    fused, eager_row, other, _, alone = read_csv(LossRow, path)
    assert (fused.ms_p50, fused.pct_of_floor, fused.speedup_vs_eager, fused.speedup_vs_compile) == (2, 25, 10, 2.5)
    assert (eager_row.speedup_vs_compile, other.speedup_vs_compile, alone.speedup_vs_compile) == (0.25, None, None)
    assert not list(tmp_path.glob("**/*.tmp"))
    write_csv(merge(read_csv(LossRow, path), [row("eager", None, note="out of memory")]), path)
    assert read_csv(LossRow, path)[0].speedup_vs_eager is None
    path.write_text("case,ms\nv1,3\n")
    with pytest.raises(ValueError, match="move it away"):
        read_csv(LossRow, path)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    where = {"gpu": "some GPU", "torch": "2", "triton": "", "commit": "abc", "date": ""}
    tiles = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
    timed = tile_bench.Row(kernel="rows", case="v1-384", N=512, **tiles, max_registers=None, pinned=True, ms=0.25,
                           spills=0, registers=128, **where)  # fmt: skip
    without_room = replace(timed, max_registers=96, pinned=False, ms=None, spills=None, registers=None)
    write_csv([timed, without_room], tmp_path / "tiles.csv")
    assert read_csv(tile_bench.Row, tmp_path / "tiles.csv") == [timed, without_room]
    assert len(_results.replace([timed], [without_room, replace(timed, ms=0.5)])) == 2


def test_a_file_of_other_columns_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_gpu: None
) -> None:
    for main, name in ((loss_bench.main, "loss_bench"), (step_bench.main, "step_bench")):
        path = tmp_path / f"{name}_cpu.csv"
        path.write_text("case,ms\nv1,3\n")
        with pytest.raises(SystemExit) as exit_code:
            main(["--quick", "--out", str(tmp_path)])
        assert exit_code.value.code == 2
        assert capsys.readouterr().err.startswith(f"{path} has columns ['case', 'ms'], this version writes ['")
        assert path.read_text() == "case,ms\nv1,3\n"


@pytest.mark.parametrize(
    ("row_type", "pattern"),
    [
        (LossRow, "loss_bench_*.csv"),
        (tile_bench.Row, "tiles_*.csv"),
        (truncation_bench.Row, "truncation_*.csv"),
        (static_report.Row, "static_report.csv"),
    ],
)
def test_committed_results_are_read(row_type: Any, pattern: str) -> None:
    """Else the next run on that device would end before it measured."""
    files = list(_results.RESULTS.glob(pattern))
    assert files
    for path in files:
        rows = read_csv(row_type, path)
        assert len({row.key for row in rows}) == len(rows) > 5


def test_ratios_are_of_fused_over_eager() -> None:
    times = {("fused", 128): 2.0, ("eager", 128): 3.0, ("fused", 1024): 1.0, ("eager", 1024): 4.0}
    in_bf16 = [row(provider, ms, n) for (provider, n), ms in times.items()]
    in_fp32 = [row("fused", 1.0, dtype="fp32"), row("eager", 5.0, dtype="fp32")]
    rows = merge([], [*in_bf16, *in_fp32])
    assert ratios(rows).splitlines()[1:] == [
        "  v1-384, 12 heads, bf16  N=128 1.50x, N=1024 4.00x",
        "  v1-384, 12 heads, fp32  N=512 5.00x",
    ]
    assert ratios(rows[1:2]) == ""


def test_plots(tmp_path: Path) -> None:
    rows = [row(name, ms * n, n, floor_ms=0.1) for name, ms in (("fused", 1.0), ("eager", 9.0)) for n in (128, 512)]
    for one in rows:
        one.B = 2048 // one.N
    written = plot([*rows, row("eager", None, 2048, note="out of memory")], tmp_path / "sub" / "rows")
    assert [path.name for path in written] == ["rows_time.png", "rows_memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert plot(rows[:1], tmp_path / "one") == []


def test_time_is_of_run_alone_and_taken_in_turns() -> None:
    order = []

    def work(name: str, seconds: float) -> Work:
        def run(prepared: str) -> None:
            order.append(name)
            assert prepared == name
            time.sleep(seconds)

        return Work(run, prepare=lambda: time.sleep(0.03) or name)

    quick, slow = time_ms([work("a", 0.001), work("b", 0.02)], "cpu")
    assert 1 <= quick.p20 <= quick.p50 <= quick.p80
    assert quick.p50 < 20 <= slow.p20
    assert order == ["a", "b"] * (_measure.REPEATS + 1)


def test_peak_memory_counts_what_lives_at_once() -> None:
    def allocate(size: int) -> Tensor:
        return torch.empty(size * MIB, dtype=torch.uint8)

    def one_after_the_other(_: None) -> None:
        allocate(3)
        allocate(4)

    assert peak_mib(Work(lambda _: (allocate(3), allocate(4))), "cpu") == pytest.approx(7, abs=0.01)
    assert peak_mib(Work(one_after_the_other), "cpu") == pytest.approx(4, abs=0.01)
    assert peak_mib(Work(lambda kept: allocate(1), prepare=lambda: allocate(2)), "cpu") == pytest.approx(3, abs=0.01)
    x = torch.ones(MIB, dtype=torch.uint8)  # inside an op: sorting makes a float copy's indices too
    assert peak_mib(Work(lambda _: x.sort()), "cpu") >= 1 + 8


def test_peak_memory_of_the_loss() -> None:
    """Eager holds a matrix of float32 scores several times over, chunked does not."""
    case = replace(SMALL, n=400)
    inputs = make_inputs(case, "cpu")
    peaks = {name: peak_mib(_compare._work(PROVIDERS[name].make(case, "cpu"), inputs, "both"), "cpu") for name in
             ("fused", "eager")}  # fmt: skip
    matrix = case.pairs * case.heads * 4 / MIB
    assert peaks["eager"] > 4 * matrix
    assert peaks["fused"] < peaks["eager"] / 2


def test_exponential_chains() -> None:
    """The kernel whose rate is measured does the exponentials that are counted."""
    import _rates

    block, steps = 64, 5
    out = torch.full((2 * block,), math.nan)
    _rates._exp2_chains[(2,)](out, STEPS=steps, BLOCK=block)
    expected = torch.arange(2 * block) * 1e-9
    for _ in range(steps):
        expected = torch.exp2(-expected)
    torch.testing.assert_close(out, expected)


def described(argument: Any) -> Any:
    """A kernel's argument; of tensors what the compiler sees."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.is_contiguous()
    return tuple(map(described, argument)) if isinstance(argument, tuple) else argument


def description(launch: Launch) -> Any:
    """All but the last scale: the row's weight, which depends on the batch."""
    arguments = {name: described(value) for name, value in launch.arguments.items()}
    *scales, _ = arguments.pop("scales", (None,))
    kernel, programs, options = launch.schedule.kernel, launch.schedule.programs, launch.schedule.options
    return kernel, programs, options, [scale and round(scale, 6) for scale in scales], arguments


@pytest.mark.parametrize(("n", "kernels"), [(8, {"resident"}), (40, set(_launches.SWEEPS))])
def test_launches_are_the_librarys(n: int, kernels: set[str], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed or compiled alone is what a call of the loss launches: kernels, tiles and constants."""
    teacher, student, _ = make_inputs(replace(SMALL, n=n), device)
    made: list[Launch] = []
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", lambda launch, device: made.append(launch))
        loss = fused_minilm_loss(teacher, student, SMALL.relations, implementation="triton")
        torch.autograd.grad(loss, student)
    library, alone = [description(launch) for launch in made], []
    for kernel in kernels:
        relations = _launches.make_relations(kernel, SMALL.relations, teacher, student)
        launch = _launches.make_launch(kernel, relations, architecture(torch.device(device)))
        assert description(launch) in library, kernel
        assert description(launch) not in alone, kernel
        alone.append(description(launch))


def test_candidates_of_tiles_are_launched_as_asked() -> None:
    case = gpu_case("v2-48", 512)
    small = make_inputs(replace(case, batch=1, n=40, heads=1), "cpu")
    for kernel, count in {"forward": 3, "rows": 1, "keys": 1, "self": 3}.items():
        relations = tile_bench.relations_of(kernel, case.relations, small)
        assert len(relations.x_s) == count
        shapes = tile_bench.candidates(kernel)
        assert len(set(shapes)) == len(shapes)
        for shape in shapes:
            launch = _launches.make_launch(kernel, relations, 90, shape)
            assert (launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]) == shape[:2]
            schedule = launch.schedule
            assert (schedule.num_warps, schedule.num_stages, schedule.max_registers) == shape[2:]


def test_loss_bench_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("_cases.CPU_TOKENS", 48)
    arguments = ["--case", "v1-384", "--heads", "48", "--out", str(tmp_path)]
    own = [*arguments, "--n", "16", "24", "--providers", "fused", "eager", "loop", "flash"]
    assert loss_bench.main([*own, "--commit", "abc"]) == 0
    rows = read_csv(LossRow, tmp_path / "loss_bench_cpu.csv")
    assert len(rows) == 2 * 4 * 3
    assert all(one.ms_p50 > 0 and one.peak_mib > 0 and one.rel_error < 1e-4 and one.note == "" for one in rows)
    assert {(one.commit, one.dtype, one.floor_ms, one.torch) for one in rows} == {
        ("abc", "fp32", None, torch.__version__)
    }
    assert all(one.speedup_vs_eager > 0 for one in rows)
    shown = capsys.readouterr().out
    assert "v1-384   qk+vv   B=2 N=24   48 heads, d 16/8   fp32" in shown
    assert shown.strip().endswith("The Triton kernels are measured on a GPU.")
    assert {path.name for path in tmp_path.iterdir()} == {
        "loss_bench_cpu.csv",
        "loss_bench_cpu_time.png",
        "loss_bench_cpu_memory.png",
    }

    assert loss_bench.main([*arguments, "--n", "24", "--providers", "eager"]) == 0
    assert len(read_csv(LossRow, tmp_path / "loss_bench_cpu.csv")) == len(rows)
    capsys.readouterr()
    assert loss_bench.main([*own, "--seconds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "time is up (--seconds), 12 rows not measured" in shown
    assert "\n\n" not in shown


def test_a_deadline_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would end too late is not begun: two calls of 0.2 s for checking, eight for timing."""
    calls = []
    monkeypatch.setitem(PROVIDERS, "slow", _around(lambda value: calls.append(time.sleep(0.2)) or value))
    inputs = make_inputs(SMALL, "cpu")
    truth = exact(SMALL, inputs)

    def modes(seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        found = [new[0].mode for new in _compare.compare(SMALL, ["slow"], inputs, truth, "cpu", deadline=deadline)]
        assert time.monotonic() < deadline + 1
        return found

    assert modes(0) == calls == []
    assert modes(1) == []
    assert modes(3.5) == ["both"]


def test_loss_bench_says_when_something_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "loop", _around(lambda value: 1.2 * value))
    own = ["--case", "v1-384", "--n", "16", "--out", str(tmp_path)]
    assert loss_bench.main([*own, "--batch", "1", "--providers", "loop"]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert loss_bench.main([*own, "--heads", "7"]) == 2
    assert "--heads 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        loss_bench.main([*own, "--heads", "0"])
    assert "argument --heads: must be at least 1, not 0" in capsys.readouterr().err


def test_step_bench_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_gpu: None) -> None:
    assert step_bench.main(["--quick", "--out", str(tmp_path), "--commit", "abc"]) == 0
    rows = read_csv(_results.StepRow, tmp_path / "step_bench_cpu.csv")
    assert [(one.student, one.objective, one.provider) for one in rows] == [
        ("1x48", "v2-48", "fused"),
        ("1x48", "v2-48", "eager"),
    ]
    assert all(one.ms_p50 > 0 and one.loss_pct > 0 and one.peak_mib > 0 and one.note == "" for one in rows)
    assert rows[0].tokens_per_s == pytest.approx(2 * 16 / rows[0].ms_p50 * 1e3, rel=1e-3)
    assert rows[0].largest_batch is None
    assert "say nothing about training" in capsys.readouterr().out


@pytest.mark.parametrize("room", [32, 33, 100, 1000, 10**9])
def test_largest_batch(room: int) -> None:
    asked: list[int] = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= room

    found = step_bench.largest_batch(fits, 32)
    assert found <= min(room, step_bench.BATCH_LIMIT)
    assert found * 9 / 8 + 1 >= min(room, step_bench.BATCH_LIMIT)
    assert len(asked) == len(set(asked)) <= 14


@pytest.mark.parametrize("main", [tile_bench.main, profile_kernels.main], ids=["tile_bench", "profile_kernels"])
def test_what_needs_a_gpu_says_so(main: Any, capsys: pytest.CaptureFixture[str], no_gpu: None) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("this machine has no CUDA device")
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_run_gpu_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_gpu: None) -> None:
    assert run_gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "python bench/loss_bench.py" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_truncation_bench_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    """Of eight layers, six are above the teacher's second: most of its forward is saved."""
    tiny = BertConfig(vocab_size=99, hidden_size=96, num_hidden_layers=8, num_attention_heads=4, intermediate_size=384)
    monkeypatch.setattr(truncation_bench, "CASES", {"tiny": (tiny, 2, 4, 2, 48)})
    assert truncation_bench.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    rows = list(csv.DictReader((tmp_path / "truncation_cpu.csv").read_text().splitlines()))
    assert [(row["case"], row["work"], row["commit"]) for row in rows] == [
        ("tiny", "teacher", "abc"),
        ("tiny", "step", "abc"),
    ]
    assert float(rows[0]["saved_pct"]) > 40
    assert float(rows[0]["stopped_ms"]) < float(rows[0]["whole_ms"])


def test_run_gpu_runs_files_that_exist(tmp_path: Path) -> None:
    for part in run_gpu.PARTS:
        for command in run_gpu.commands(part, tmp_path, "abc"):
            files = [word for word in command if word.endswith(".py")]
            assert all(Path(word).exists() for word in files)
            assert files or command[:2] == ["ncu", "--import"]
    [tests] = run_gpu.commands("tests", tmp_path, None)
    assert len(tests) > 8
    assert "addopts=" in tests  # a GPU machine may lack the plugin that pyproject.toml's options need
    memcheck, racecheck = run_gpu.commands("sanitize", tmp_path, None)
    assert [command[command.index("--tool") + 1] for command in (memcheck, racecheck)] == ["memcheck", "racecheck"]
    assert run_gpu.commands("bench", tmp_path, "abc")[0][-2:] == ["--commit", "abc"]
    assert run_gpu.MEASURE_SECONDS < run_gpu.PART_SECONDS < 9 * 60


def test_run_gpu_logs_and_ends_commands(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    assert run_gpu.run([sys.executable, "-c", "import minilm_kernels; print('well')"], log, 60)
    assert log.getvalue() == "well\n"
    assert not run_gpu.run([sys.executable, "-c", "raise SystemExit(3)"], log, 60)
    start = time.monotonic()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert not run_gpu.run([sys.executable, "-c", child], log, 1)
    assert time.monotonic() - start < 30
    assert "killed, after at most 1 s" in capsys.readouterr().out


@pytest.mark.parametrize("part", run_gpu.NEEDS)
def test_run_gpu_says_which_tool_is_not_there(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_gpu.shutil, "which", lambda name: None)
    assert run_gpu.run_part(part, tmp_path, None)
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"{part}: {run_gpu.NEEDS[part][0]} was not found on this machine; {run_gpu.NEEDS[part][1]}"


def test_run_gpu_copies_this_devices_results(tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    out.mkdir()
    names = {"loss_bench_h200.csv", "step_bench_h200.csv", "loss_bench_h200_time.png", "truncation_h200.csv"}
    for name in [*names, "loss_bench_cpu.csv", "static_report.csv"]:
        (results / name).write_text(name)
    assert {path.name for path in run_gpu.copy_results(results, out, "h200")} == names
    assert {path.name for path in out.iterdir()} == names
    assert run_gpu.copy_results(results, results, "h200") == []


def test_device_in_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert (_results.device_slug("cuda"), _results.device_slug("cpu")) == ("a100-sxm4-80gb", "cpu")


def test_environment_outside_of_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_results, "ROOT", tmp_path)
    assert _results.environment("cpu")["commit"] == "unknown"
    assert _results.environment("cpu", "abc")["commit"] == "abc"


TINY = systems_bench.Sizes(
    BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,  # models that differ
    ),
    batch=4,
    n=20,
)


@pytest.mark.parametrize("name", systems_bench.MEASURED)
def test_a_step_of_each_system_trains_the_student(name: str) -> None:
    torch.manual_seed(0)
    step, own_parameters = systems_bench.make_step(name, TINY, "cpu")
    losses = [step() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert own_parameters == (32 * 32 if name == "tinybert" else 0)


def test_the_table_of_systems_has_what_was_measured() -> None:
    rows = [
        systems_bench.SystemRow(system="a", B=1, N=2, own_parameters=1024, ms_p50=1234.5, peak_mib=2.6),
        systems_bench.SystemRow(system="b", B=1, N=2, note="out of memory"),
    ]
    assert systems_bench.markdown(rows) == "| a | 1,024 | 1,234 | 3 |"
