"""The ops `minilm_kernels::{triton,chunked}_{forward,backward}`, registered so that torch.compile sees one node each.

Forward returns the sums or rows, the logarithms of the softmax sums, and the gradients it prepared, of each relation's
x and y: with the row weights but not the gradient of the loss (`Relations.folds_weight`); lists and tensors that the
implementation does not need are empty. Backward completes the gradients in place. For self relations dx is the whole.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from minilm_kernels._relations import SCHEMA, Relations

_LIBRARY = torch.library.Library("minilm_kernels", "DEF")
_FORWARD = f"({SCHEMA}, bool needs_gradient) -> (Tensor value, Tensor lse_t, Tensor lse_s, Tensor[] dx, Tensor[] dy)"
_BACKWARD = (
    f"({SCHEMA}, Tensor lse_t, Tensor lse_s, Tensor grad, float[] relation_weights, "
    "Tensor(a!)[] dx, Tensor(b!)[] dy) -> ()"
)


def _call(module: str, function: str, *args: Any) -> Any:
    fields = len(Relations._fields)
    return getattr(import_module(module), function)(Relations(*args[:fields]), *args[fields:])


def _register(implementation: str) -> None:
    call = partial(_call, f"minilm_kernels._{implementation}")
    for direction, schema, fake in (
        ("forward", _FORWARD, partial(call, "allocate")),
        ("backward", _BACKWARD, lambda *_: None),
    ):
        name = f"{implementation}_{direction}"
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, partial(call, direction), "CompositeExplicitAutograd")
        torch.library.register_fake(f"minilm_kernels::{name}", fake, lib=_LIBRARY)


for _implementation in ("triton", "chunked"):
    _register(_implementation)


def named(implementation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward op of an implementation."""
    ops = torch.ops.minilm_kernels
    if implementation == "triton":
        return ops.triton_forward.default, ops.triton_backward.default
    return ops.chunked_forward.default, ops.chunked_backward.default
