"""Users' mistakes, each answered by one sentence with both offending values, before any kernel starts."""

import importlib.util
import math
import numbers
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from minilm_kernels._allowed import Pattern

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip
REDUCTIONS = ("sequence", "token", "sum")
IMPLEMENTATIONS = ("triton", "chunked", "reference")
RELATIONS = tuple(x + y for x in "qkv" for y in "qkv")
Layout = tuple[Sequence[int], tuple[int, ...], torch.dtype, torch.device]  # shape, stride, dtype, device of a tensor
MAX_TRITON_DIM = 1024
LEAST_FACTOR, GREATEST_FACTOR = 1e-8, 1e8  # of scores; beyond, the kernels' FLOOR times it is near others or infinite
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: dynamo cannot trace the question
_TRACING = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
_FLOAT32 = torch.finfo(torch.float32)


def check_triple(whose: str, triple: object) -> None:
    if not isinstance(triple, (tuple, list)) or len(triple) != 3:
        size = f"{len(triple)} of them" if isinstance(triple, (tuple, list)) else type(triple).__name__
        raise TypeError(f"{whose} must be three tensors (q, k, v), got {size}")


def check_tensors(relation: str, sides: Sequence[object]) -> None:
    """Refuses what is no dense tensor among x_t, y_t, x_s, y_s of a relation."""
    for name, x in zip(side_names(relation), sides, strict=True):
        if x is None and relation in RELATIONS:
            raise ValueError(f"relation {relation!r} needs the {name}, got None")
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        check_dense(name, x)


def check_dense(name: str, x: Tensor) -> None:
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; pad it, and give attention_mask")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {x.layout}")


def side_names(relation: str) -> list[str]:
    """What the user calls x_t, y_t, x_s and y_s of a relation; `relation_kl` calls them just so."""
    if relation not in RELATIONS:
        return ["x_t", "y_t", "x_s", "y_s"]
    return [f"{whose}'s {letter}" for whose in ("teacher", "student") for letter in relation]


def check_layouts(relations: Sequence[tuple[str, Sequence[Layout]]]) -> None:
    """Floating tensors (B, H, N, D), no dimension 0; one device, B and N for all, one dtype within a model."""
    named = [(side_names(relation), layouts) for relation, layouts in relations]
    for names, layouts in named:
        for name, (shape, _, dtype, _) in zip(names, layouts, strict=True):
            if len(shape) != 4:
                raise ValueError(f"{name} must have 4 dimensions (B, H, N, D), got {len(shape)}: {tuple(shape)}")
            if dtype not in FLOATS:
                raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype}")
            if 0 in shape:
                raise ValueError(f"{name} must have no empty dimension, got {tuple(shape)}")
    (first, _, first_student, _), ((shape, _, dtype_t, device), _, (_, _, dtype_s, _), _) = named[0]
    batch, _, length, _ = shape
    for names, layouts in named:
        for place, (name, (x_shape, _, x_dtype, x_device)) in enumerate(zip(names, layouts, strict=True)):
            if x_device != device:
                raise ValueError(f"{first} is on {device}, {name} on {x_device}; all must be on one device")
            if x_shape[0] != batch:
                raise ValueError(f"{first} has batch size {batch}, {name} has {x_shape[0]}")
            if x_shape[2] != length:
                raise ValueError(f"{first} has {length} tokens, {name} has {x_shape[2]}")
            own, dtype = (first, dtype_t) if place < 2 else (first_student, dtype_s)
            if x_dtype != dtype:
                raise TypeError(f"{own} is {dtype}, {name} {x_dtype}; give one model one dtype")


def check_equal_heads(relation: str, teacher_heads: int, student_heads: int) -> None:
    if teacher_heads != student_heads:
        raise ValueError(
            f"relation {relation!r} has {teacher_heads} heads in the teacher and {student_heads} in the student; "
            "set relation_heads to split both into the same number"
        )


def check_pattern(pattern: Pattern, batch: int, length: int, device: torch.device) -> None:
    """Shapes, types and devices of what restricts the keys; values too where that costs no synchronisation."""
    mask, causal, prefix, cu_seqlens = pattern
    if mask is None and prefix is None and cu_seqlens is None:
        return
    if cu_seqlens is not None and (mask is not None or prefix is not None):
        other = "attention_mask" if mask is not None else "prefix_lengths"
        raise ValueError(f"cu_seqlens and {other} exclude each other: packed sequences have no padding and no prefix")
    if prefix is not None and not causal:
        raise ValueError("prefix_lengths needs causal=True, got causal=False")
    for name, x in (("attention_mask", mask), ("prefix_lengths", prefix), ("cu_seqlens", cu_seqlens)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        check_dense(name, x)
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, the query, key and value tensors are on {device}")
        if name != "attention_mask" and x.dtype not in INTEGERS:
            raise TypeError(f"{name} must be an integer tensor, got {x.dtype}")
    if mask is not None:
        if mask.dtype not in (torch.bool, *INTEGERS, *FLOATS):
            raise TypeError(f"attention_mask must be a bool, integer or float tensor, got {mask.dtype}")
        if mask.shape != (batch, length):
            raise ValueError(f"attention_mask must have shape (B, N) = ({batch}, {length}), got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and _readable(mask):
            _check_mask_values(mask)
    if prefix is not None:
        if prefix.shape != (batch,):
            raise ValueError(f"prefix_lengths must have shape (B,) = ({batch},), got {tuple(prefix.shape)}")
        if _readable(prefix) and not all([0 <= end <= length for end in prefix.tolist()]):
            raise ValueError(f"prefix_lengths must lie in 0..{length}, got {prefix.tolist()}")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs one packed row (B = 1), got B = {batch}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens must have shape (S + 1,) with S >= 1, got {tuple(cu_seqlens.shape)}")
        if _readable(cu_seqlens):
            edges = cu_seqlens.tolist()
            if edges[0] != 0 or edges != sorted(edges) or edges[-1] > length:
                raise ValueError(f"cu_seqlens must rise from 0 to at most N = {length}, got {edges}")


def _check_mask_values(mask: Tensor) -> None:
    """Refuses an additive mask (0 keeps, a large negative number drops), which would be read the wrong way round."""
    if mask.dtype in FLOATS:
        wrong = (mask != 0) & (mask != 1)
    elif mask.dtype.is_signed:
        wrong = mask < 0
    else:
        return
    if bool(wrong.any()):
        type_name, wanted = ("float", "0 and 1") if mask.dtype in FLOATS else ("integer", "0 and positive numbers")
        raise ValueError(
            f"attention_mask of a {type_name} type must hold {wanted}, got {mask[wrong][0].item()}; "
            "an additive mask is not taken: give `mask == 0`"
        )


def check_causal(causal: object) -> None:
    if causal is False or causal is True:
        return
    if isinstance(causal, Tensor) or not isinstance(causal, Hashable) or causal not in (False, True):
        raise TypeError(f"causal must be True or False, got {_shown(causal)}")


def as_temperature(temperature: object) -> float:
    """The temperature as a float, where float32 holds it and its inverse."""
    number = _as_float("temperature", temperature)
    if not number > 0:
        raise ValueError(f"temperature must be positive, got {number}")
    if not _FLOAT32.tiny <= number <= _FLOAT32.max:
        raise ValueError(
            f"temperature must lie within {_FLOAT32.tiny:.3g} and {_FLOAT32.max:.3g}, as float32 holds it, got {number}"
        )
    return number


def as_scales(scale: object) -> tuple[float | None, float | None]:
    """What multiplies the scores of teacher and student, None for 1/√d."""
    if not isinstance(scale, (tuple, list)):
        scale = (scale, scale)
    if len(scale) != 2:
        raise ValueError(f"scale must be one number or two, the teacher's and the student's, got {len(scale)} of them")
    return _as_scale("teacher", scale[0]), _as_scale("student", scale[1])


def _as_scale(whose: str, scale: object) -> float | None:
    if scale is None:
        return None
    number = _as_float(f"the {whose}'s scale", scale)
    if not number > 0:
        raise ValueError(f"the {whose}'s scale must be positive, got {number}")
    return number


def score_factor(whose: str, scale: float | None, dim: int, temperature: float) -> float:
    """What multiplies a model's products: its scale, 1/√dim if None, over the temperature."""
    number = 1 / math.sqrt(dim) if scale is None else scale
    factor = number / temperature
    if not LEAST_FACTOR <= factor <= GREATEST_FACTOR:
        raise ValueError(
            f"the {whose}'s scale over the temperature must lie within {LEAST_FACTOR:g} and {GREATEST_FACTOR:g}, "
            f"got {number:.3g} / {temperature:.3g}"
        )
    return factor


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {_shown(value)}")


def as_relation_heads(relation_heads: object) -> int | None:
    if relation_heads is None:
        return None
    if isinstance(relation_heads, bool) or not isinstance(relation_heads, (int, numbers.Integral)):
        raise TypeError(f"relation_heads must be an int or None, got {type(relation_heads).__name__}")
    if relation_heads < 1:
        raise ValueError(f"relation_heads must be at least 1, got {relation_heads}")
    return relation_heads if isinstance(relation_heads, int) else int(relation_heads)


def relation_weights(relations: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Weight of each relation by name, those of weight 0 left out; an unknown, repeated or negative one raises."""
    if isinstance(relations, (str, Tensor)) or not isinstance(relations, Iterable):
        got = f"the string {relations!r}" if isinstance(relations, str) else _shown(relations)
        raise TypeError(f"relations must be a sequence of names or a dict of weights, got {got}")
    names = list(relations)
    if not names:
        raise ValueError("relations is empty; MiniLM uses ('qk', 'vv'), MiniLMv2 ('qq', 'kk', 'vv')")
    for name in names:
        if not (isinstance(name, str) and name in RELATIONS):
            raise ValueError(f"unknown relation {_shown(name)}; a relation is two of the letters q, k, v")
        if names.count(name) > 1:
            raise ValueError(f"relation {name!r} is named {names.count(name)} times; give it a weight instead")
    if not isinstance(relations, Mapping):
        return dict.fromkeys(names, 1.0)
    weights = {name: _as_float(f"the weight of relation {name!r}", relations[name]) for name in names}
    for name, weight in weights.items():
        if not 0 <= weight <= _FLOAT32.max:
            raise ValueError(
                f"the weight of relation {name!r} must be finite (in float32) and not negative, got {weight}"
            )
    if not any(weights.values()):
        raise ValueError(f"every relation has weight 0: {weights}; nothing would be learnt")
    return {name: weight for name, weight in weights.items() if weight}


def _as_float(name: str, value: object) -> float:
    """A number of Python or numpy as a float. A tensor is refused: it may be learnt, and a constant is not."""
    if not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    try:
        return value if isinstance(value, float) else float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that float32 holds, got one beyond {_FLOAT32.max:.3g}") from None


def _described(value: object) -> str:
    """The value in an error: "the string 'a'", else the name of its type; after a tensor's, what to give instead."""
    if isinstance(value, str):
        return f"the string {_shown(value)}"
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} (it would get no gradient; .item() is its value)"
    return type(value).__name__


def _shown(value: object) -> str:
    """What the user wrote in one line, or its type where that would be long."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def choose_implementation(implementation: str | None, device: str, dim: int, double: bool) -> str:
    """The named implementation if it takes `dim` dimensions a head, else an error; None: the best for the device."""
    if implementation is None:
        fits = device == "cuda" and dim <= MAX_TRITON_DIM and not double
        return "triton" if fits and _HAS_TRITON else "chunked"
    if implementation == "triton":
        if double:
            raise TypeError("implementation='triton' takes float32, bfloat16 and float16, got float64")
        if dim > MAX_TRITON_DIM:
            raise ValueError(f"implementation='triton' takes head dimensions up to {MAX_TRITON_DIM}, got {dim}")
        if device != "cuda" and not torch.compiler.is_compiling() and not _triton_interprets():
            raise ValueError(f"implementation='triton' needs tensors on cuda, got {device}")
    return implementation


def _triton_interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which takes tensors on any device."""
    if not _HAS_TRITON:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _readable(x: Tensor) -> bool:
    """Whether a value can be read: without a device synchronisation, a graph break, or being fake or batched."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and not any([torch._C._get_dispatch_mode(mode) for mode in _TRACING])
    )
