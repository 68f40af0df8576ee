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
from minilm.models.heads import ExampleOutput, Output, TokenOutput, run_up_to_output
from minilm.models.layers import numbered, resolve_layer, uncompiled


class Needs(NamedTuple):
    """What is taken from a forward. Layers are 1 to L, or -1 to -L from the last down."""

    qkv: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()  # 0: the embeddings, which the first layer is given
    output: bool = False  # of the head


class Observed(NamedTuple):
    """What was taken, under the layers' names in `Needs`."""

    qkv: dict[int, QKV]  # q (B, H, N, D), k and v (B, H_kv, N, D)
    hidden: dict[int, Tensor]  # (B, N, d)
    output: Output | None

    @property
    def tokens(self) -> int | None:
        """N; None where nothing of tokens was taken."""
        for q, _, _ in self.qkv.values():
            return q.shape[2]
        hidden = [*self.hidden.values(), *([self.output.hidden] if isinstance(self.output, TokenOutput) else [])]
        return hidden[0].shape[1] if hidden else None

    @property
    def tensors(self) -> list[Tensor]:
        """All activations: of q, k, v, of hidden states, and what the head was given or, of a classifier, gives."""
        output = self.output
        of_head = [] if output is None else [output.logits if isinstance(output, ExampleOutput) else output.hidden]
        return [*(x for qkv in self.qkv.values() for x in qkv), *self.hidden.values(), *of_head]


def observe(model: PreTrainedModel, inputs: Mapping[str, Any], needs: Needs) -> Observed:
    """One forward on `inputs`, no further than what is needed; none at all where nothing is.

    q, k, v are those of `capture`, the output is that of `run_up_to_output`. The hidden state of a layer is what it
    hands to the next one: of the last layer before a final norm. Gradients flow if they are enabled. A compiled model
    runs compiled for q, k, v alone; hooks, which take the rest, need the original.

    Raises as `capture` does, and `ValueError` for a model without a head, or without a list of layers.
    """
    if needs == Needs():
        return Observed({}, {}, None)
    original = uncompiled(model)
    if "use_cache" in inspect.signature(original.forward).parameters:
        inputs = {**inputs, "use_cache": False}  # a cache hands out copies of k and v
    if not needs.hidden and not needs.output:
        with capture(model, needs.qkv, stop=True) as captured:
            model(**inputs)
        return Observed(captured, {}, None)
    last_qkv = max((resolve_layer(original, layer) for layer in needs.qkv), default=0)
    last_hidden = max((_hidden_layer(original, layer) for layer in needs.hidden), default=0)
    qkv: dict[int, QKV] = {}
    hidden: dict[int, Tensor] = {}
    output = None
    with ExitStack() as taking:
        if needs.qkv:
            at_qkv = not needs.output and last_qkv > last_hidden
            qkv = taking.enter_context(capture(original, needs.qkv, stop=at_qkv))
        if needs.hidden:
            at_hidden = not needs.output and last_hidden >= last_qkv
            hidden = taking.enter_context(_hidden_states(original, needs.hidden, stop=at_hidden))
        if needs.output:
            output = run_up_to_output(original, inputs)
        else:
            original(**inputs)
    return Observed(qkv, hidden, output)


def resolve_needs(model: PreTrainedModel, needs: Needs) -> Needs:
    """The same with layers from 0 or 1 up. Raises `ValueError` for a layer that does not exist."""
    qkv = tuple(resolve_layer(model, layer) for layer in needs.qkv)
    return Needs(qkv, tuple(_hidden_layer(model, layer) for layer in needs.hidden), needs.output)


def _hidden_layer(model: PreTrainedModel, layer: int) -> int:
    return layer and resolve_layer(model, layer)


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
