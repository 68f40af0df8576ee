"""What a loss needs of a model: q, k, v and hidden states of any layers and the head's output, from one forward.

B batch, H heads, H_kv heads of key and value, N tokens, D head dimension, d hidden size.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.models.capture import QKV, StopForward, capture, end_frames
from minilm.models.heads import Output, TokenOutput, run_up_to_output
from minilm.models.layers import numbered, resolve_layer, uncompiled
from minilm.models.probes import base_of


class Needs(NamedTuple):
    """What is taken from a forward. Layers are 1 to L, or -1 to -L from the last down."""

    qkv: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()  # 0: the embeddings, which the first layer is given
    final: bool = False  # what the model without its head returns
    output: bool = False  # of the head


class Observed(NamedTuple):
    """What was taken, under the layers' names in `Needs`."""

    qkv: dict[int, QKV]  # q (B, H, N, D), k and v (B, H_kv, N, D)
    hidden: dict[int, Tensor]  # (B, N, d)
    final: Tensor | None = None  # (B, N, d), behind a final norm
    output: Output | None = None

    @property
    def tokens(self) -> int | None:
        """N; None where nothing of tokens was taken."""
        for q, _, _ in self.qkv.values():
            return q.shape[2]
        of_head = self.output.hidden if isinstance(self.output, TokenOutput) else None
        hidden = [x for x in (*self.hidden.values(), self.final, of_head) if x is not None]
        return hidden[0].shape[1] if hidden else None


def observe(model: PreTrainedModel, inputs: Mapping[str, Any], needs: Needs) -> Observed:
    """One forward on `inputs`, no further than what is needed; none at all where nothing is.

    q, k, v are those of `capture`, the output is that of `run_up_to_output`. The hidden state of a layer is what it
    hands to the next one: of the last layer before a final norm, behind which `final` is. Gradients flow if they are
    enabled. A compiled model runs compiled for q, k, v alone; hooks, which take the rest, need the original.

    Raises as `capture` does, and `ValueError` for a model without a head, or without a list of layers.
    """
    if needs == Needs():
        return Observed({}, {})
    original = uncompiled(model)
    if "use_cache" in inspect.signature(original.forward).parameters:
        inputs = {**inputs, "use_cache": False}  # a cache hands out copies of k and v
    to_the_end = needs.final or needs.output
    if not needs.hidden and not to_the_end:
        with capture(model, needs.qkv, stop=True) as captured:
            model(**inputs)
        return Observed(captured, {})
    last_qkv = max((resolve_layer(original, layer) for layer in needs.qkv), default=0)
    last_hidden = max((_hidden_layer(original, layer) for layer in needs.hidden), default=0)
    qkv: dict[int, QKV] = {}
    hidden: dict[int, Tensor] = {}
    output = None
    with ExitStack() as taking:
        if needs.qkv:
            at_qkv = not to_the_end and last_qkv > last_hidden
            qkv = taking.enter_context(capture(original, needs.qkv, stop=at_qkv))
        if needs.hidden:
            at_hidden = not to_the_end and last_hidden >= last_qkv
            hidden = taking.enter_context(_hidden_states(original, needs.hidden, stop=at_hidden))
        final = taking.enter_context(_final_state(original)) if needs.final else []
        if needs.output:
            output = run_up_to_output(original, inputs)
        elif needs.final:
            base_of(original)(**inputs)
        else:
            original(**inputs)
    return Observed(qkv, hidden, final[0] if final else None, output)


def resolve_needs(model: PreTrainedModel, needs: Needs) -> Needs:
    """The same with layers from 0 or 1 up. Raises `ValueError` for a layer that does not exist."""
    qkv = tuple(resolve_layer(model, layer) for layer in needs.qkv)
    return needs._replace(qkv=qkv, hidden=tuple(_hidden_layer(model, layer) for layer in needs.hidden))


def _hidden_layer(model: PreTrainedModel, layer: int) -> int:
    return layer and resolve_layer(model, layer)


@contextmanager
def _final_state(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Keep what the model without its head returns, from the forward inside the `with` block."""
    found: list[Tensor] = []

    def after(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0])  # of a model's output the last hidden state, as of a tuple

    with base_of(model).register_forward_hook(after):
        yield found


@contextmanager
def _hidden_states(model: PreTrainedModel, layers: Sequence[int], *, stop: bool) -> Iterator[dict[int, Tensor]]:
    """Keep what the layers hand on, from the forward inside the `with` block; with `stop` it ends at the last one."""
    wanted = {name: _hidden_layer(model, name) for name in layers}
    stop_at = max(wanted.values()) if stop else None
    found: dict[int, Tensor] = {}
    calls: Counter[int] = Counter()
    reached = StopForward()

    def take(layer: int, hidden: Tensor) -> None:
        found.update({name: hidden for name, number in wanted.items() if number == layer})
        if layer == stop_at:
            raise reached

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if calls.total() == 0:
            take(0, next(iter((*args, *kwargs.values()))))

    with ExitStack() as hooks:
        places = numbered(model)
        hooks.enter_context(places[0][0].register_forward_pre_hook(before, with_kwargs=True))
        for module, numbers in places:

            def after(_: nn.Module, __: Any, output: Any, numbers: list[int] = numbers) -> None:
                layer = numbers[calls[numbers[0]] % len(numbers)]
                calls[numbers[0]] += 1
                take(layer, output[0] if isinstance(output, tuple) else output)

            hooks.enter_context(module.register_forward_hook(after))
        try:
            yield found
        except StopForward as stopped:
            if stopped is not reached:
                raise
            end_frames(stopped)
            stopped.__traceback__ = None  # it leads back here, and would keep what was found until a garbage collection
