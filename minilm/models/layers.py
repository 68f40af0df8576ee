"""The layers of a transformers model: how many, which a number names, and which modules lie in which."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from minilm.errors import UsageError


def num_layers(model_or_config: Any) -> int:
    """Number of Transformer layers, as the config counts them.

    Raises `ValueError` where it does not say (several Transformers in one).
    """
    config = getattr(model_or_config, "config", model_or_config)
    layers = getattr(config, _layers_name(model_or_config), None)
    if not isinstance(layers, int):
        raise UsageError(f"{type(config).__name__} has no num_hidden_layers: pass one Transformer of the model")
    return layers


def _layers_name(model_or_config: Any) -> str:
    """Where the config counts the layers: of an encoder-decoder's config, num_hidden_layers are the encoder's."""
    config, name = getattr(model_or_config, "config", None), type(model_or_config).__name__
    is_decoder = isinstance(getattr(config, "decoder_layers", None), int) and (
        "Decoder" in name or name.endswith("ForCausalLM")
    )
    return "decoder_layers" if is_decoder else "num_hidden_layers"


def resolve_layer(model_or_config: Any, layer: int) -> int:
    """The layer's number from 1 (bottom) to L; -1 is the last. Raises `ValueError` outside 1..L and -L..-1."""
    last = num_layers(model_or_config)
    if not 1 <= abs(layer) <= last:
        raise UsageError(f"layer {layer} does not exist: layers are 1 to {last}, or -{last} to -1 from the last down")
    return layer if layer > 0 else last + 1 + layer


def resolve_layer_map(teacher: Any, student: Any, layers: Mapping[int, int]) -> dict[int, int]:
    """The student's layers, each with the teacher's, by their numbers from 1.

    Raises `ValueError` for a layer that does not exist, and for one of the student's that stands twice.
    """
    resolved: dict[int, int] = {}
    for of_student, of_teacher in layers.items():
        pair = []
        for whose, model, layer in (("student", student, of_student), ("teacher", teacher, of_teacher)):
            if not 1 <= abs(layer) <= num_layers(model):
                raise UsageError(
                    f"layer_map {_written(layers)} names layer {layer} of the {whose}, which has {num_layers(model)}"
                )
            pair.append(resolve_layer(model, layer))
        if pair[0] in resolved:
            raise UsageError(
                f"layer_map {_written(layers)} names layer {pair[0]} of the student twice, then as {of_student}"
            )
        resolved[pair[0]] = pair[1]
    return resolved


def _written(layers: Mapping[int, int]) -> str:
    return ",".join(f"{student}:{teacher}" for student, teacher in layers.items())


def uncompiled(model: Any) -> PreTrainedModel:
    """The transformers model itself, or that within a compiled one. Raises `TypeError` for anything else."""
    original = getattr(model, "_orig_mod", model)
    if isinstance(original, PreTrainedModel):
        return original
    name = type(original).__name__
    wrapped = getattr(original, "module", None)
    hint = ""
    if isinstance(wrapped, PreTrainedModel):
        hint = f": wrap a module in {name} whose forward captures the model, as DistillationModel's does"
    raise TypeError(f"capture takes a transformers model (PreTrainedModel), got {name}{hint}")


_LISTS = (nn.ModuleList, nn.Sequential)


def places_of(model: PreTrainedModel, modules: list[nn.Module]) -> tuple[dict[int, tuple[int, ...]], set[int]]:
    """For the id of each module within a layer, that layer's number, or numbers in the order in which it runs as them.

    Also the ids of modules that have their like in the same layer. The layers are the outermost lists as long as the
    config says; ALBERT's groups of layers run one after another, each as often as its share.
    """
    runs = _runs(model)
    places: dict[int, tuple[int, ...]] = {}
    several: set[int] = set()
    for layers in modules:
        if not isinstance(layers, _LISTS) or len(layers) != len(runs) or id(layers) in places:
            continue
        own: dict[int, list[int]] = {}
        for layer, numbers in zip(layers, runs, strict=True):
            for module in layer.modules():
                own.setdefault(id(module), []).extend(numbers)
                if isinstance(module, _LISTS) and len({type(member) for member in module}) < len(module):
                    several.update(id(inner) for member in module for inner in member.modules())
        for module_id, found in own.items():
            places.setdefault(module_id, tuple(found))
    if not places:
        raise UsageError(_other_count(model, modules))
    return places, several


def numbered(model: PreTrainedModel) -> list[tuple[nn.Module, list[int]]]:
    """The layers, bottom to top, each with its number, or the numbers in the order in which it runs as them.

    Raises `ValueError` where no list of modules with attention is as long as the config says.
    """
    runs, modules = _runs(model), list(model.modules())
    for layers in modules:
        if isinstance(layers, _LISTS) and len(layers) == len(runs) and any(map(reads_interface, layers.modules())):
            return list(zip(layers, runs, strict=True))
    raise UsageError(_other_count(model, modules))


def _runs(model: PreTrainedModel) -> list[list[int]]:
    """For each member of the list of layers the numbers that it runs as: one, but for ALBERT's groups."""
    count = num_layers(model)
    groups: int = getattr(model.config, "num_hidden_groups", count)
    return [[layer + 1 for layer in range(count) if int(layer / (count / groups)) == group] for group in range(groups)]


def _other_count(model: PreTrainedModel, modules: list[nn.Module]) -> str:
    if not any(map(reads_interface, modules)):
        return f"no attention can be seen: {computes_by_itself(model, modules)}"
    name, counted = type(model).__name__, _layers_name(model)
    held: dict[str, int] = {}
    for path, layers in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in held)
        if isinstance(layers, _LISTS) and not inside and any(map(reads_interface, layers.modules())):
            held[path] = len(layers)
    found = " and ".join(f"{length} in {path}" for path, length in held.items()) or "no list of them"
    hint = f": set model.config.{counted} = {next(iter(held.values()))}" if len(held) == 1 else ""
    return f"{name} counts {num_layers(model)} layers in its config ({counted}) and holds {found}{hint}"


def reads_interface(module: nn.Module) -> bool:
    forward: Any = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def computes_by_itself(model: PreTrainedModel, modules: list[nn.Module]) -> str:
    attentions = [type(module).__name__ for module in modules if "Attention" in type(module).__name__]
    if not attentions:
        return f"{type(model).__name__} has none there, its layer is a {type(modules[0]).__name__}"
    return (
        f"{attentions[-1]} of models of type {model.config.model_type!r} computes attention by itself, "
        "not through transformers' AttentionInterface"
    )
