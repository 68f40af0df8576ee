"""The ops `minilm_kernels::{triton,chunked}_{forward,backward,backward_}`: torch.compile sees one node each.

Eager code has no use for them, and calls what they run: each passage through the dispatcher costs 10 µs.

Forward returns the sums or rows, the logarithms of the softmax sums, and the gradients it prepared, of each relation's
x and y. These do not hold the gradient of the loss; `Relations.weights_in_gradients` says whether they hold the row
weights. Lists that the implementation does not need are empty. `backward` makes the gradients out of them.
`backward_` completes them in place; those that were not prepared come uninitialised. For self relations dx is the whole
gradient.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from minilm_kernels._relations import SCHEMA, Relations

_LIBRARY = torch.library.Library("minilm_kernels", "DEF")
_FORWARD = (
    f"({SCHEMA}, bool needs_gradient) -> (Tensor value, Tensor[] lse_t, Tensor[] lse_s, Tensor[] dx, Tensor[] dy)"
)
_SAVED = f"{SCHEMA}, Tensor[] lse_t, Tensor[] lse_s, Tensor grad"
_BACKWARD = f"({_SAVED}, Tensor[] dx, Tensor[] dy) -> (Tensor[] dx, Tensor[] dy)"
_BACKWARD_IN_PLACE = f"({_SAVED}, Tensor(a!)[] dx, Tensor(b!)[] dy) -> ()"


_FIELDS = len(Relations._fields)
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


@cache
def _function(implementation: str, name: str) -> Callable[..., Any]:
    """The function, imported when it is first called, as Triton takes its time."""
    return getattr(import_module(f"minilm_kernels._{implementation}"), name)  # type: ignore[no-any-return]


def _call(implementation: str, name: str, *args: Any) -> Any:
    return _function(implementation, name)(Relations(*args[:_FIELDS]), *args[_FIELDS:])


def _make_gradients(complete: Callable[..., None], *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """`backward` by way of `backward_`, on copies."""
    *saved, dx, dy = args
    relations = Relations(*args[:_FIELDS])
    dx = [x.clone() for x in dx] or [torch.empty_like(x) for x in relations.x_s]
    dy = [y.clone() for y in dy] or [torch.empty_like(y) for y in relations.y_s]
    complete(*saved, dx, dy)
    return dx, dy


def _nothing(*args: Any) -> None:
    """What an op in place does to tensors without storage."""


def _register(implementation: str) -> None:
    complete = partial(_call, implementation, "backward")
    for name, schema, run, fake in (
        ("forward", _FORWARD, partial(_call, implementation, "forward"), partial(_call, implementation, "allocate")),
        ("backward", _BACKWARD, partial(_make_gradients, complete), partial(_make_gradients, _nothing)),
        ("backward_", _BACKWARD_IN_PLACE, complete, _nothing),
    ):
        op = f"{implementation}_{name}"
        _LIBRARY.define(op + schema)
        _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"minilm_kernels::{op}", fake, lib=_LIBRARY)


for _implementation in ("triton", "chunked"):
    _register(_implementation)


def _ops(name: str) -> dict[str, Callable[..., Any]]:
    return {i: getattr(torch.ops.minilm_kernels, f"{i}_{name}").default for i in ("triton", "chunked")}


_FORWARD_OPS, BACKWARD, _BACKWARD_IN_PLACE_OPS = _ops("forward"), _ops("backward"), _ops("backward_")


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether ops are to be seen: by a compiler, a dispatch mode (fake tensors are one), or a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    )


def forward(implementation: str, watched: bool, relations: Relations, needs_gradient: bool) -> Any:
    if watched:
        return _FORWARD_OPS[implementation](*relations, needs_gradient)
    return _function(implementation, "forward")(relations, needs_gradient)


def backward_(implementation: str, watched: bool, relations: Relations, *saved: Any) -> None:
    if watched:
        _BACKWARD_IN_PLACE_OPS[implementation](*relations, *saved)
    else:
        _function(implementation, "backward")(relations, *saved)
