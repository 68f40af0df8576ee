"""The ops `minilm_kernels::{triton,chunked}_{forward,backward}`, registered so that torch.compile sees one node each.

Both implementations have the same two ops; y_t and y_s are None for a self relation. What an op returns for meta tensors
is what its module's `allocate_…` returns, which the op itself fills. Modules are imported at their first use.
B batch, R relation heads, N tokens; tensors that were not asked for are empty.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("minilm_kernels", "DEF")

# dx and dy are of unit row weight: dx is there if needs_gradient, dy if the implementation prepares it
_FORWARD = (
    "(Tensor x_t, Tensor? y_t, Tensor x_s, Tensor? y_s, Tensor? bounds, Tensor? holes, float scale_t, float scale_s, "
    "bool needs_gradient, bool prepare) -> (Tensor rows, Tensor lse_t, Tensor lse_s, Tensor dx, Tensor dy)"
)
_BACKWARD = (
    "(Tensor x_t, Tensor? y_t, Tensor x_s, Tensor? y_s, Tensor? bounds, Tensor? holes, Tensor lse_t, Tensor lse_s, "
    "Tensor dx, Tensor dy, Tensor weight, float scale_t, float scale_s, bool along_sequence) -> (Tensor dx, Tensor dy)"
)


def _register(implementation: str) -> None:
    module = f"minilm_kernels._{implementation}"

    def call(function: str, *args: Any) -> Any:
        return getattr(import_module(module), function)(*args)

    for direction, schema in (("forward", _FORWARD), ("backward", _BACKWARD)):
        name = f"{implementation}_{direction}"
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, partial(call, direction), "CompositeExplicitAutograd")
        torch.library.register_fake(f"minilm_kernels::{name}", partial(call, f"allocate_{direction}"), lib=_LIBRARY)


for _implementation in ("triton", "chunked"):
    _register(_implementation)


def named(implementation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward op of an implementation."""
    ops = torch.ops.minilm_kernels
    if implementation == "triton":
        return ops.triton_forward.default, ops.triton_backward.default
    return ops.chunked_forward.default, ops.chunked_backward.default
