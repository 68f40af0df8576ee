"""Loss and gradients by the compiled kernels, without a GPU (see ptxrun): every kernel, type and kind of mask.

Compiling takes most of the time. So cases of one type share shapes where that makes them share kernels, stand together,
and of what no type changes (masks without padding, layouts) bfloat16 alone has all. Most have a cross and a self
relation; on such a GPU, up to 64 tokens (32 in float32) stay on chip.
"""

from collections.abc import Callable
from typing import Any

import pytest
import test_loss_precision as precision
import test_loss_reductions as reductions
import torch
from compiled import check_forward, check_repeats, launched
from loss_cases import Case, check
from torch import Tensor

Run = Callable[..., Any]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PADDED = ("right", "left", "holes", "empty", "one")
KEYS = ("all", "padding", "causal padding", "prefix padding", "causal", "packed", "packed causal")
NUMBERS: dict[tuple[str, str], dict[str, Any]] = {
    ("hundreds", "padding"): {"size": 12.0},
    ("hundreds, causal", "causal padding"): {"size": 12.0},
    ("spread", "all"): {"spread": 0.7},
    ("near", "all"): {"size": 0.3, "distance": 0.02},
    ("equal", "all"): {"distance": 0.0},
}
LENGTHS = {2: {"on chip": 37, "tiles": 129}, 4: {"on chip": 29, "tiles": 65}}  # by bytes of a number


def fields(keys: str, n: int) -> dict[str, Any]:
    match keys:
        case "all":
            return {"batch": 2}
        case "causal":
            return {"batch": 2, "causal": True}
        case "padding" | "causal padding":
            return {"batch": 5, "masks": PADDED, "causal": keys != "padding"}
        case "prefix padding":
            return {"batch": 5, "masks": PADDED, "causal": True, "prefix": (0, n // 3, n, n // 2, 1)}
        case "packed" | "packed causal":
            return {"packed": tuple(n * part // 9 for part in (0, 1, 1, 4, 5, 8)), "causal": keys != "packed"}
    raise ValueError(keys)


def of_types(name: str, place: str, *dtypes: torch.dtype, keys: tuple[str, ...]) -> list[Case]:
    """These kinds of keys, and if the models' types are equal every kind of numbers."""
    n = LENGTHS[max(dtype.itemsize for dtype in dtypes)][place]
    calls = {kind: fields(kind, n) for kind in keys}
    common: dict[str, Any] = {"n": n, "dtypes": (dtypes[0], dtypes[-1]), "teacher": (2, 2, 16)}
    if len(dtypes) == 1:
        common["student"] = (2, 2, 16)
        for (kind, kind_keys), numbers in NUMBERS.items():
            calls[kind] = numbers | fields(kind_keys if kind_keys in keys else "padding", n)
    return [Case(id=f"{name} {place}, {kind}", **common, **call) for kind, call in calls.items()]


def agreeing(name: str, dtype: torch.dtype) -> list[Case]:
    """Students that nearly agree with their teacher: a KL of a row from 1e-6 to 1."""
    common: dict[str, Any] = {"n": 129, "dtypes": (dtype, dtype), "teacher": (2, 2, 16), "student": (2, 2, 16)}
    common |= {"reduction": "sum"} | fields("padding", 129)
    distances = ((0.3, 0.01), (0.3, 0.1), (1.0, 0.02), (1.0, 0.1), (1.0, 0.8))
    return [
        Case(id=f"{name} tiles, {distance:g} away at {size:g}", size=size, distance=distance, **common)
        for size, distance in distances
    ]


def wide(
    name: str, dtype: torch.dtype, n: int, *dimensions: tuple[int, int], relations: tuple[str, ...] = ("qk", "vv")
) -> list[Case]:
    common: dict[str, Any] = {"n": n, "dtypes": (dtype, dtype), "relations": relations}
    return [
        Case(id=f"{name} {d_t}/{d_s}", teacher=(1, 1, d_t), student=(1, 1, d_s), **common) for d_t, d_s in dimensions
    ]


def one_hot(name: str, dtype: torch.dtype, d_t: int, d_s: int, **call: Any) -> Case:
    """Rows of a self relation that see their own token alone, in both models: scores of 100 to 200."""
    heads = {"teacher": (2, 2, d_t), "student": (2, 2, d_s)}
    return Case(id=name, dtypes=(dtype, dtype), relations=("kk",), **heads, **call)


def laid_out(name: str, n: int, *layouts: str, masks: tuple[str, ...] = ("right", "left")) -> list[Case]:
    common = {"n": n, "batch": len(masks), "masks": masks, "dtypes": (BF16, BF16), "relations": ("qk",)}
    return [Case(id=f"{name}, {layout}", layout=layout, **common) for layout in layouts]


HEADS = {
    "grouped": {"teacher": (4, 2, 16), "student": (4, 1, 8)},
    "split again": {"teacher": (4, 4, 24), "student": (2, 2, 36), "relation_heads": 6, "layout": "tokens first"},
}
CASES = [
    *of_types("bf16", "on chip", BF16, keys=tuple(kind for kind in KEYS if kind != "causal")),
    *of_types("bf16", "tiles", BF16, keys=KEYS),
    *of_types("fp16", "on chip", FP16, keys=("padding",)),
    *of_types("fp16", "tiles", FP16, keys=("padding", "causal padding")),
    *agreeing("fp16", FP16),
    *of_types("fp32", "on chip", FP32, keys=("padding", "causal padding", "prefix padding")),
    *of_types("fp32", "tiles", FP32, keys=("all", "padding", "causal padding", "prefix padding")),
    *of_types("bf16 to fp32", "tiles", BF16, FP32, keys=("padding",)),
    *of_types("fp16 to bf16", "on chip", FP16, BF16, keys=("padding",)),
    *of_types("fp32 to fp16", "tiles", FP32, FP16, keys=("padding",)),
    *wide("bf16 on chip", BF16, 37, (64, 32), relations=("qk",)),
    *wide("bf16 tiles", BF16, 200, (64, 64), (80, 128), (256, 200), relations=("qk",)),
    *wide("fp16 tiles", FP16, 100, (130, 200)),
    *wide("fp16 tiles", FP16, 100, (300, 140), relations=("qk",)),
    *wide("fp32 tiles", FP32, 50, (64, 32), relations=("qk",)),
    *wide("fp32 tiles", FP32, 50, (26, 80)),
    one_hot("fp16 one-hot, tiles", FP16, 40, 70, n=100, size=4.5, reduction="sum"),
    one_hot("bf16 one-hot, tiles, causal", BF16, 70, 70, n=129, size=5.0, causal=True),
    one_hot("fp16 one-hot, wide", FP16, 150, 150, n=100, size=3.0),
    *laid_out("bf16 on chip", 37, "fused qkv", "dimension first", "every other", "amid NaN", "expanded"),
    *laid_out("bf16 on chip", 37, "far apart", masks=("holes",)),
    *laid_out("bf16 tiles", 129, "far apart", masks=("holes",)),
    *[Case(id=kind, n=37, batch=2, dtypes=(BF16, BF16), relations=("qk",), **heads) for kind, heads in HEADS.items()],
]


WALK: dict[str, Any] = {"relations": ("qk",), "teacher": (2, 2, 64), "student": (2, 2, 32)}
HOPPER = [
    *[
        Case(id=f"{name} tiles, {keys}", n=129, dtypes=(dtype, dtype), **fields(keys, 129))
        for name, dtype, kinds in (
            ("bf16", BF16, ("all", "padding", "causal padding")),
            ("fp16", FP16, ("padding",)),
        )
        for keys in kinds
    ],
    Case(id="bf16 on chip, padding", n=37, dtypes=(BF16, BF16), relations=("vv",), **fields("padding", 37)),
    Case(id="bf16 on chip, a walk over the heads", n=100, dtypes=(BF16, BF16), **WALK, **fields("padding", 100)),
    *wide("bf16 tiles", BF16, 200, (64, 32), relations=("qk",)),
    *wide("bf16 tiles", BF16, 200, (128, 128)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_against_float64(case: Case, compiled: Run) -> None:
    compiled(check, case, "triton", "cpu", True)


@pytest.mark.parametrize("case", HOPPER, ids=lambda case: case.id)
def test_against_float64_on_hopper(case: Case, compiled_for_hopper: Run) -> None:
    compiled_for_hopper(check, case, "triton", "cpu", True)


@pytest.mark.parametrize("relation", [reductions.CROSS, reductions.SELF])
@pytest.mark.parametrize("name", ["fp16", "fp32"])
def test_rows_under_any_weights(name: str, relation: str, compiled: Run) -> None:
    (case,) = [case for case in CASES if case.id == f"{name} tiles, padding"]
    compiled(reductions.test_rows_under_any_weights, case, relation, "triton", "cpu")


@pytest.mark.parametrize("sides", precision.SIDES.values(), ids=precision.SIDES)
def test_coarse_scores_and_close_students(sides: list[Tensor], compiled: Run) -> None:
    compiled(precision.test_at_most_twice_the_error_of_eager_code, sides, "triton", "cpu")


def test_a_loss_is_not_negative_beyond_rounding(compiled: Run) -> None:
    compiled(precision.test_a_loss_is_not_negative_beyond_rounding, "triton", "cpu")


@pytest.mark.parametrize("place", ["on chip", "tiles"])
def test_loss_alone(place: str, compiled: Run) -> None:
    (case,) = [case for case in CASES if case.id == f"bf16 {place}, all"]
    compiled(check_forward, case)


@pytest.mark.parametrize("place", ["on chip", "tiles"])
@pytest.mark.parametrize(("name", "keys"), [("bf16", "padding"), ("bf16", "packed"), ("fp32", "padding")])
def test_same_bits_in_any_schedule(name: str, place: str, keys: str, compiled: Run) -> None:
    (case,) = [case for case in CASES if case.id == f"{name} {place}, {keys}"]
    compiled(check_repeats, case)


def test_every_kernel_ran(compiled: Run) -> None:
    """On chip one, and another where the loss's own gradient is not 1; the sweeps for cross and self relations."""
    on_chip, tiles = (case for case in CASES if case.id in ("bf16 on chip, all", "bf16 tiles, all"))
    assert compiled(launched, on_chip) == {"resident", "scale_in_place"}
    assert compiled(launched, tiles) == {"row_sweep", "key_sweep", "key_factors", "self_sweep"}
