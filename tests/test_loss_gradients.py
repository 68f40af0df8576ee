"""Loss and gradients of every implementation against float64 autograd of the reference, over a covering set of calls.

Lengths and dimensions are no multiples of a block; few heads where N is large, for the interpreter's sake. Without a
GPU, Triton's kernels get most of their cases in test_compiled.py.
"""

import pytest
import torch
from loss_cases import Case, build, check, eager_and_exact, evaluate

from minilm_kernels import fused_minilm_loss

pytestmark = pytest.mark.usefixtures("nan_filled")

V2 = ("qq", "kk", "vv")
ALL_NINE = tuple(x + y for x in "qkv" for y in "qkv")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

SHAPES = [
    Case(id="one token", n=1, batch=2, teacher=(2, 2, 6), student=(2, 2, 6)),
    Case(id="one dimension", n=7, batch=2, teacher=(2, 2, 1), student=(2, 2, 1), relations=ALL_NINE),
    Case(id="D=6", n=7, batch=3, teacher=(2, 2, 6), student=(2, 2, 6), masks=("right", "full", "one")),
    Case(id="D=8", n=37, batch=2, relations=V2, masks=("left", "holes")),
    Case(id="D=12", n=129, teacher=(1, 1, 12), student=(1, 1, 12), masks=("holes",)),
    Case(id="D=26", n=70, teacher=(1, 1, 26), student=(1, 1, 26), masks=("right",)),
    Case(id="D=32", n=129, teacher=(1, 1, 32), student=(1, 1, 32), relations=("kv", "qq")),
    Case(id="D=64", n=129, batch=2, teacher=(1, 1, 64), student=(1, 1, 64), masks=("left", "right")),
    Case(id="D=80", n=37, teacher=(2, 2, 80), student=(2, 2, 80)),
    Case(id="N=16", n=16, masks=("left",)),
    Case(id="N=64", n=64, teacher=(1, 1, 12), student=(1, 1, 12), relations=("qk", "kk")),
    Case(id="N=65", n=65, teacher=(1, 1, 12), student=(1, 1, 12), relations=("qk", "kk")),
    Case(id="D=128", n=37, teacher=(1, 1, 128), student=(1, 1, 128)),
    Case(id="D=256", n=37, teacher=(1, 1, 256), student=(1, 1, 256)),
    Case(id="unequal dimensions", n=37, batch=2, teacher=(2, 2, 80), student=(2, 2, 26), masks=("full", "holes")),
    Case(id="student wider", n=37, teacher=(2, 2, 6), student=(2, 2, 32), relations=("vk", "kk")),
    Case(id="N=300 self", n=300, teacher=(1, 1, 12), student=(1, 1, 6), relations=("vv",), masks=("holes",)),
]
# heads that are read in parts, of teacher, student or both; a gradient of one part and of several
WIDE = [
    Case(
        id="D=1024", n=70, teacher=(1, 1, 1024), student=(1, 1, 1024), size=0.5, relations=("qk",),
        dtypes=(BF16, BF16),
    ),
    Case(id="D=129 and 513", n=19, teacher=(1, 1, 129), student=(1, 1, 513), size=0.5, masks=("holes",)),
    Case(
        id="wide student", n=70, teacher=(1, 1, 24), student=(1, 1, 300), size=0.5, dtypes=(FP16, FP16),
        relations=("qk", "kk"), causal=True,
    ),
    Case(
        id="wide teacher", n=129, teacher=(1, 1, 200), student=(1, 1, 24), size=0.5, dtypes=(BF16, BF16),
        relations=("kk",), masks=("right",),
    ),
    Case(
        id="wide, packed", n=37, teacher=(1, 1, 130), student=(1, 1, 260), size=0.5, packed=(0, 7, 20, 33),
        relations=("qk", "kk"), dtypes=(BF16, FP32), reduction="token",
    ),
    Case(
        id="one relation head", n=37, batch=2, teacher=(4, 4, 48), student=(3, 3, 48), size=0.5, relation_heads=1,
        relations=("qq", "kv"), layout="fused qkv", dtypes=(FP16, BF16),
    ),
    Case(
        id="wide, close", n=70, teacher=(1, 1, 136), student=(1, 1, 136), size=0.5, distance=0.02,
        relations=("qk", "kk"), dtypes=(BF16, BF16), layout="amid NaN",
    ),
    Case(
        id="wide unit vectors", n=70, teacher=(1, 1, 384), student=(1, 1, 192), unit=True, scale=1 / 0.07,
        relations=("kk",), dtypes=(BF16, BF16), masks=("left",),
    ),
]  # fmt: skip
PATTERNS = [
    Case(id="empty sequence", n=37, batch=3, masks=("full", "empty", "right")),
    Case(id="first sequence empty", n=7, batch=2, masks=("empty", "holes"), relations=("qq", "qv")),
    Case(id="all empty", n=37, batch=2, masks=("empty", "empty"), relations=("qk", "qq")),
    Case(id="causal", n=129, batch=2, teacher=(1, 1, 8), student=(1, 1, 8), causal=True, relations=("qk", "vv")),
    Case(id="causal N=300", n=300, teacher=(1, 1, 8), student=(1, 1, 8), causal=True, relations=("kk",)),
    Case(id="causal masked", n=37, batch=4, causal=True, masks=("holes", "left", "empty", "right")),
    Case(id="prefix", n=37, batch=4, causal=True, prefix=(0, 1, 12, 37), relations=("qk", "kk")),
    Case(
        id="prefix masked", n=129, batch=3, teacher=(1, 1, 8), student=(1, 1, 8), causal=True, prefix=(70, 100, 129),
        masks=("right", "left", "holes"),
    ),
    Case(id="packed", n=129, teacher=(1, 1, 12), student=(1, 1, 8), packed=(0, 0, 1, 38, 38, 110, 117, 117)),
    Case(id="packed to the end", n=37, packed=(0, 7, 37), relations=("qk", "kk")),
    Case(id="packed of nothing", n=7, packed=(0, 0, 0), relations=("qk", "vv")),
    Case(id="packed causal", n=129, teacher=(1, 1, 8), student=(1, 1, 8), packed=(0, 66, 66, 100), causal=True),
]  # fmt: skip
HEADS = [
    Case(id="grouped", n=37, teacher=(4, 2, 8), student=(4, 1, 6), relations=("qk",), masks=("holes",)),
    Case(id="grouped, v1", n=7, batch=2, teacher=(4, 2, 8), student=(4, 2, 6), relations=("qk", "vv", "vq")),
    Case(
        id="6 relation heads", n=37, teacher=(4, 4, 24), student=(2, 2, 36), relations=V2, relation_heads=6,
        masks=("right",), layout="tokens first",
    ),
    Case(id="48 relation heads", n=19, teacher=(12, 12, 32), student=(12, 12, 24), relations=V2, relation_heads=48),
    Case(id="64 relation heads", n=7, teacher=(16, 16, 64), student=(12, 12, 64), relations=("qq",), relation_heads=64),
    Case(id="fewer relation heads", n=37, teacher=(6, 6, 8), student=(4, 4, 8), relation_heads=2),
    Case(
        id="grouped, re-split", n=19, teacher=(4, 2, 12), student=(6, 2, 8), relations=("qk", "kk", "kq"),
        relation_heads=8, masks=("holes",), layout="tokens first",
    ),
]  # fmt: skip
NUMBERS = [
    Case(id="scores in the hundreds", n=37, size=15.0, relations=("qk", "kv", "qv")),
    Case(id="one-hot self relation", n=37, size=15.0, relations=("qk", "vv")),
    Case(id="hundreds, masked", n=129, teacher=(1, 1, 32), student=(1, 1, 12), size=12.0, masks=("holes",)),
    Case(id="spread rows", n=129, teacher=(1, 1, 8), student=(1, 1, 8), spread=1.2, relations=V2),
    Case(id="spread rows a little", n=129, teacher=(1, 1, 8), student=(1, 1, 8), spread=0.5, size=2.0, relations=V2),
    Case(id="close", n=129, teacher=(1, 1, 32), student=(1, 1, 32), distance=1e-3, relations=("qk", "vv", "kk")),
    Case(id="equal", n=37, distance=0.0),
    Case(id="warm", n=37, temperature=2.5, relations=(("qk", 0.3), ("vv", 2.0), ("kq", 1.0))),
    Case(id="cold", n=37, temperature=0.2, relations=("qk", "qq")),
]
SCALES = [
    Case(id="one scale", n=37, scale=0.8, masks=("right",), causal=True),
    Case(id="two scales", n=19, batch=2, scale=(0.3, 0.9), masks=("holes", "full"), relations=ALL_NINE),
    Case(id="two scales, tiles", n=70, scale=(1.2, 0.4), relations=("qk", "kk"), temperature=1.5, reduction="sum"),
    Case(id="two scales, bf16", n=70, scale=(1.2, 0.4), relations=("qk", "kk"), dtypes=(BF16, BF16)),
    Case(id="two scales, fp16", n=70, scale=(0.4, 1.2), relations=("qk", "kk"), dtypes=(FP16, FP16), causal=True),
    Case(id="the teacher's scale", n=37, student=(2, 2, 12), scale=(1.0, None)),
    Case(
        id="the student's scale, re-split", n=37, teacher=(4, 2, 12), student=(6, 2, 8), relation_heads=8,
        scale=(None, 0.6),
    ),
    Case(id="unit vectors", n=70, teacher=(1, 1, 48), student=(1, 1, 24), unit=True, scale=1 / 0.07, relations=V2),
    Case(
        id="unit vectors, bf16", n=70, batch=2, teacher=(1, 1, 48), student=(1, 1, 48), unit=True, distance=0.05,
        scale=1 / 0.07, relations=("kk",), dtypes=(BF16, BF16),
    ),
]  # fmt: skip
# the types of teacher and student; in each a cross and a self relation, one and several tiles, a mask
TYPES = [
    Case(id=f"{name} {case.id}", dtypes=dtypes, **{k: v for k, v in vars(case).items() if k not in ("id", "dtypes")})
    for name, dtypes in {
        "bf16": (BF16, BF16),
        "fp16": (FP16, FP16),
        "bf16 to fp32": (BF16, FP32),
        "fp16 to bf16": (FP16, BF16),
        "fp32 to fp16": (FP32, FP16),
    }.items()
    for case in (
        Case(id="v1", n=37, batch=2, teacher=(2, 2, 32), student=(2, 2, 12), masks=("holes", "left")),
        Case(id="tiles", n=129, teacher=(1, 1, 64), student=(1, 1, 64), causal=True, relations=("qk", "kk")),
    )
] + [
    Case(id="bf16 close", n=129, teacher=(1, 1, 32), student=(1, 1, 32), distance=0.05, dtypes=(BF16, BF16)),
    Case(id="fp16 close", n=129, teacher=(1, 1, 32), student=(1, 1, 32), distance=0.01, dtypes=(FP16, FP16)),
    Case(id="bf16 hundreds", n=37, teacher=(2, 2, 32), student=(2, 2, 32), size=12.0, dtypes=(BF16, BF16)),
    Case(id="bf16 hundreds, tiles", n=129, teacher=(1, 1, 32), student=(1, 1, 32), size=12.0, dtypes=(BF16, BF16)),
    Case(id="bf16 N=128", n=128, teacher=(1, 1, 32), student=(1, 1, 26), relations=("qk", "kk"), dtypes=(BF16, BF16)),
    Case(
        id="bf16 48 heads", n=7, teacher=(12, 12, 32), student=(12, 12, 24), relation_heads=48,
        relations=("qk",), dtypes=(BF16, BF16), layout="fused qkv",
    ),
]  # fmt: skip
LAYOUTS = [
    Case(
        id=f"{layout}, N={n}", n=n, batch=2, teacher=(heads, heads, 12), student=(heads, heads, 6),
        masks=("right", "left"), relations=("qk", "kk", "vv"), layout=layout,
    )
    for layout in ("tokens first", "fused qkv", "dimension first", "every other", "amid NaN", "expanded", "mixed")
    for n, heads in ((37, 2), (70, 1))
]  # fmt: skip


CASES = SHAPES + WIDE + PATTERNS + HEADS + NUMBERS + SCALES + TYPES + LAYOUTS
# What test_compiled.py lacks: few tokens, heads and dimensions, and many heads, none of which compile to other code.
INTERPRETED = (
    "one token", "one dimension", "D=6", "N=16", "N=64", "student wider", "first sequence empty", "all empty",
    "packed of nothing", "packed to the end", "grouped, v1", "64 relation heads", "fewer relation heads",
    "grouped, re-split", "warm", "cold", "bf16 48 heads", *(case.id for case in WIDE + SCALES),
)  # fmt: skip
IN_TRITON = CASES if torch.cuda.is_available() else [case for case in CASES if case.id in INTERPRETED]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_chunked_against_float64(case: Case, device: str) -> None:
    check(case, "chunked", device)


@pytest.mark.parametrize("case", IN_TRITON, ids=lambda case: case.id)
def test_triton_against_float64(case: Case, device: str) -> None:
    check(case, "triton", device)


@pytest.mark.parametrize(
    "case", SHAPES[3:4] + PATTERNS[3:9] + HEADS[:2] + NUMBERS[-1:] + SCALES[1:2], ids=lambda case: case.id
)
def test_chunked_in_float64_is_the_reference(case: Case, device: str) -> None:
    _, exact = eager_and_exact(case, device)
    actual = evaluate(build(case, device), "chunked", torch.float64)
    assert actual.loss.dtype == torch.float64
    torch.testing.assert_close(actual.loss, exact.loss, rtol=1e-12, atol=1e-14)
    for g, g_exact in zip(actual.gradients, exact.gradients, strict=True):
        assert (g is None) == (g_exact is None)
        if g is not None:
            torch.testing.assert_close(g, g_exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("trained", ["q", "k", "v", "qk"])
def test_only_what_requires_grad(trained: str, implementation: str, device: str) -> None:
    """One side of a relation may be frozen: the other's gradient stays, and the teacher never gets one."""
    case = Case(id="frozen", n=37, relations=("qk", "kv", "vv"), masks=("holes",))
    inputs = build(case, device)
    student = [x.clone().requires_grad_(letter in trained) for letter, x in zip("qkv", inputs.student, strict=True)]
    teacher = [x.clone().requires_grad_() for x in inputs.teacher]
    fused_minilm_loss(teacher, student, **inputs.options, implementation=implementation).backward()
    assert all(x.grad is None for x in teacher)
    expected = evaluate(inputs, implementation).gradients
    for letter, x, g in zip("qkv", student, expected, strict=True):
        if letter in trained:
            torch.testing.assert_close(x.grad, g, rtol=1e-5, atol=1e-9)
        else:
            assert x.grad is None


def test_nothing_to_train(implementation: str, device: str) -> None:
    """The loss of a student without gradients has no graph, though the teacher could have one."""
    inputs = build(Case(id="frozen", n=19), device)
    teacher = tuple(x.requires_grad_() for x in inputs.teacher)
    loss = fused_minilm_loss(teacher, inputs.student, **inputs.options, implementation=implementation)
    assert not loss.requires_grad
