"""Query, key and value of chosen layers, taken out of any transformers model while it runs.

transformers looks the attention function up by the name in the model's config and hands it q, k, v after rotary
position and before the attention core. `capture` points that name, for as long as it is active, to a function
registered here that keeps the tensors of the wanted layers and calls the function the model had; the mask function goes
along, or padding would be ignored.

B batch, H heads, H_kv heads of key and value (fewer than H in grouped-query attention), N tokens, D head dimension.
"""

import copy
import functools
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minilm.errors import UsageError
from minilm.models.layers import computes_by_itself, num_layers, places_of, reads_interface, resolve_layer, uncompiled

QKV = tuple[Tensor, Tensor, Tensor]


@contextmanager
def capture(model: PreTrainedModel, layers: Sequence[int] = (-1,), *, stop: bool = False) -> Iterator[dict[int, QKV]]:
    """Keep q, k, v of `layers` from the forward that runs inside the `with` block.

        with capture(teacher, [21], stop=True) as captured, torch.no_grad():
            teacher(**inputs)
        q, k, v = captured[21]      # (B, H, N, D), (B, H_kv, N, D), (B, H_kv, N, D), in the dtype the model computes in

    softmax(q kᵀ/√D) is the model's own attention, but for its mask, window, additive bias (T5, Swin), softcap (Gemma 2)
    and sinks. Where the model's scale is 1/√D the tensors are those that it computes, views where it made views; where
    it is another (Whisper and ESM scale q beforehand, T5 never, Gemma and Granite by a constant of their config),
    scale·√D is multiplied into q. All are in the model's graph. Under autocast they have its dtype, as the attention
    core would get them. The model's outputs do not change.

    The keys of `captured` are the layers as named in `layers` (1 is the bottom, -1 the last). A layer's number is its
    place among the layers that the model holds now, whatever it was when the model was made; ALBERT's count as they
    run. Of several forwards the last counts; a decoder that fills a cache hands out copies of k and v (call it with
    `use_cache=False`). A compiled model runs compiled, with the capture in its graph.

    With `stop=True` the forward ends right after the projections of the highest wanted layer: no attention core, no
    FFN, no higher layer, no output. What stands behind the model's call inside the block is then not run.

    Raises `TypeError` for anything but a transformers model (unwrap DDP and the like), and `ValueError` for a layer
    that does not exist, an encoder-decoder, a config that counts other layers than the model holds, several
    self-attentions in one layer (Swin, ALBERT with inner_group_num above 1), layerdrop in training mode, reentrant
    gradient checkpointing, and, on leaving the block, where the attention of a wanted layer was not seen.
    """
    recorder = _Recorder(model, layers, stop)
    _switch(recorder.configs)
    _active.recorders.append(recorder)
    try:
        yield recorder.captured
    except StopForward as reached:
        if reached.args[0] is not recorder:
            raise
        end_frames(reached)
    finally:
        _active.recorders.remove(recorder)
        _switch_back(recorder.configs)
    recorder.check_complete()


def attention_qkv(model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: int = -1) -> QKV:
    """q (B, H, N, D), k and v (B, H_kv, N, D) of one layer, from a forward on `inputs` that stops there.

    Gradients flow if they are enabled. Raises as `capture` does.
    """
    takes_cache = "use_cache" in inspect.signature(uncompiled(model).forward).parameters
    with capture(model, (layer,), stop=True) as captured:
        model(**{**inputs, "use_cache": False} if takes_cache else inputs)
    return captured[layer]


class StopForward(BaseException):
    """Ends a forward for who raised it; not an `Exception`, so that no model's own `except` takes it."""


def end_frames(reached: StopForward) -> None:
    """Ends what the stopped forward had begun, such as the hooks of gradient checkpointing.

    torch before 2.13 ends those when the frames are freed, which their reference to the exception puts off.
    """
    if not torch.compiler.is_compiling():
        traceback.clear_frames(reached.__traceback__)


class _Recorder:
    """What one `capture` wants of one model, and what it has got."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], stop: bool) -> None:
        model = uncompiled(model)
        if model.config.is_encoder_decoder and hasattr(model.base_model, "decoder"):
            name = type(model).__name__
            raise UsageError(f"{name} is an encoder-decoder: capture model.get_encoder() or model.get_decoder()")
        self.wanted = {layer: resolve_layer(model, layer) for layer in layers}
        if not self.wanted:
            raise UsageError(f"layers is {layers!r}: name at least one layer of 1 to {num_layers(model)}")
        self.model = model
        self.modules = list(model.modules())
        _refuse_reentrant_checkpointing(self.modules)
        _refuse_layerdrop(model)
        self.places, self.several = places_of(model, self.modules)
        self.stop_at = max(self.wanted.values()) if stop else None
        self.configs = _configs(self.modules)
        self.captured: dict[int, QKV] = {}
        self._owners: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._begun_in = graph_task()

    def take(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> bool:
        """Keep the tensors if the layer is wanted; true where the forward shall end."""
        # Gradient checkpointing runs layers again, inside a backward that this capture was not entered in.
        if id(module) not in self.places or graph_task() != self._begun_in:
            return False
        if id(module) in self.several:
            raise UsageError(
                f"{type(self.model).__name__} has several attentions ({type(module).__name__}) in each of the "
                f"{num_layers(self.model)} layers that its config counts, by stage or by group: no number names one"
            )
        places = self.places[id(module)]
        call = self._calls.get(id(module), 0)
        self._calls[id(module)] = call + 1
        layer = places[call % len(places)]
        if self._owners.setdefault(layer, id(module)) != id(module):
            return False  # the layer's cross-attention, which comes after its self-attention
        for name, wanted in self.wanted.items():
            if wanted == layer:
                self.captured[name] = _as_the_core_gets_them(_fold(query, scaling), key, value)
        return layer == self.stop_at

    def check_complete(self) -> None:
        missing = [name for name in self.wanted if name not in self.captured]
        if not missing:
            return
        layer = self.wanted[missing[0]]
        inside = [module for module in self.modules if layer in self.places.get(id(module), ())]
        if not any(map(reads_interface, inside)):
            raise UsageError(f"no attention of layers {missing} was seen: {computes_by_itself(self.model, inside)}")
        name = type(self.model).__name__
        if not self._owners:
            raise UsageError(f"no attention of layers {missing} was seen: no forward of {name} ran inside capture")
        ran = sorted(self._owners)
        raise UsageError(f"no attention of layers {missing} was seen: the forward of {name} ran that of layers {ran}")


def _fold(query: Tensor, scaling: float | None) -> Tensor:
    """q such that q kᵀ/√D are the scores of attention functions that take `scaling`, None for 1/√D."""
    factor = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])
    return query if math.isclose(factor, 1.0, rel_tol=1e-6) else query * factor


def _as_the_core_gets_them(*tensors: Tensor) -> QKV:
    """Autocast casts the operands of every attention core, and rotary position leaves q and k in float32."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
    query, key, value = tensors
    return query, key, value


class _Active(threading.local):
    """The captures of this thread, outermost first."""

    def __init__(self) -> None:
        self.recorders: list[_Recorder] = []


_active = _Active()


def graph_task() -> int:
    """The backward that Python runs in, -1 outside of one; dynamo never sees a recomputation."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _attend(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The registered attention function: record, then stop or do what the model would have done."""
    stopping = None
    for recorder in _active.recorders:
        if recorder.take(module, query, key, value, kwargs.get("scaling")):
            stopping = recorder
    if stopping is not None:
        raise StopForward(stopping)
    if implementation == "eager":
        return _eager_attention(module)(module, query, key, value, *args, **kwargs)
    reads_config = implementation not in ("sdpa", "flex_attention")
    seen = _Unswitched(module, implementation) if reads_config else module
    return ALL_ATTENTION_FUNCTIONS[implementation](seen, query, key, value, *args, **kwargs)


def _eager_attention(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the model's own file, registered nowhere: the function that the module's forward names."""
    forward: Any = inspect.unwrap(type(module).forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    if len(names) == 1:
        function: Callable[..., Any] = forward.__globals__[names[0]]
        return function
    name = type(module).__name__
    raise UsageError(f'capture does not find the eager attention of {name}: load with attn_implementation="sdpa"')


class _Unswitched:
    """An attention module with its own config's name: flash attention asks `module.config` which version to run."""

    def __init__(self, module: Any, implementation: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation_internal = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_PREFIX = "minilm_capture_"  # the original's name follows, because transformers looks for "flash" in the name


def _register(implementation: str) -> None:
    AttentionInterface.register(_PREFIX + implementation, functools.partial(_attend, implementation))
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(_PREFIX + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


for _implementation in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
    _register(_implementation)

_users: dict[int, int] = {}  # id of a switched config -> captures that need it switched, from any thread
_users_lock = threading.Lock()


def _lock() -> AbstractContextManager[Any]:
    return nullcontext() if torch.compiler.is_compiling() else _users_lock  # dynamo cannot trace a lock


def _configs(modules: list[nn.Module]) -> list[Any]:
    """The distinct config objects in which the modules look their attention up."""
    configs = {}
    for module in modules:
        config = module.__dict__.get("config")  # a failing getattr of a module is slow, and this runs at every step
        if getattr(config, "_attn_implementation", None):
            configs[id(config)] = config
    return list(configs.values())


def _switch(configs: list[Any]) -> None:
    # The plain attribute: `set_attn_implementation` and the property reach into sub-configs, and to_dict leaves it out.
    with _lock():
        for config in configs:
            implementation = config._attn_implementation
            _users[id(config)] = _users.get(id(config), 0) + 1
            if not implementation.startswith(_PREFIX):  # else another capture's, or a deep copy made inside one
                if _PREFIX + implementation not in ALL_ATTENTION_FUNCTIONS:
                    _register(implementation)
                config._attn_implementation_internal = _PREFIX + implementation


def _switch_back(configs: list[Any]) -> None:
    with _lock():
        for config in configs:
            _users[id(config)] -= 1
            if _users[id(config)] == 0:
                del _users[id(config)]
                config._attn_implementation_internal = config._attn_implementation.removeprefix(_PREFIX)


def _refuse_reentrant_checkpointing(modules: list[nn.Module]) -> None:
    for module in modules:
        function = module.__dict__.get("_gradient_checkpointing_func")
        active = function is not None and module.training and module.gradient_checkpointing
        if active and getattr(function, "keywords", {}).get("use_reentrant"):
            raise UsageError(
                "reentrant checkpointing gives captured tensors no gradient: "
                'enable gradient checkpointing with {"use_reentrant": False}, it has {"use_reentrant": True}'
            )


def _refuse_layerdrop(model: PreTrainedModel) -> None:
    """Some read the probability from their config, others keep their own."""
    if not model.training:
        return
    kept = {
        f"{path}.layerdrop".lstrip("."): module.__dict__["layerdrop"]
        for path, module in model.named_modules()
        if "layerdrop" in module.__dict__
    }
    for where, probability in (kept or {"config.layerdrop": getattr(model.config, "layerdrop", 0.0)}).items():
        if probability:
            raise UsageError(
                f"{type(model).__name__} in training mode leaves out whole layers at random: "
                f"set model.{where} = 0.0, it is {probability}"
            )
