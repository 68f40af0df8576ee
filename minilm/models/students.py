"""Students: smaller models of the teacher's class, what of them relation training leaves out, and their size."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.layers import num_layers as layers_of
from minilm.models.layers import resolve_layer
from minilm.models.observe import Needs, Observed, observe
from minilm.models.probes import base_of, evaluating, model_tried, probe_inputs
from minilm.models.weights import (
    FFN_NAMES,
    check_projection,
    copy_weights,
    head_dim,
    kv_heads,
    project_embeddings,
    stacks_of,
    widths,
)

Init = Literal["auto", "random", "layers", "slice", "pca"]

# In no attribute_map of transformers.
_WIDTH_FOLLOWERS = ("embedding_size", "pooler_output_size")  # follow hidden_size where they were equal to it
_STAGES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")  # layers of a backbone
_BY_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "no_rope_layers", "layers_block_type")


def build_student(
    teacher: PreTrainedModel,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    init: Init = "auto",
    teacher_layers: Sequence[int] | None = None,
    with_head: bool = False,
    seed: int | None = None,
) -> PreTrainedModel:
    """A float32 model on the CPU of the class that is the teacher's base: no head, loadable by `AutoModel`.

    `with_head` makes it of the teacher's own class, with a head for the same vocabulary or labels, which starts as
    the rest does.

    It has a pooler where the class has one by default, so that a checkpoint loads with nothing missing; relation
    training never trains it. Sizes left out are the teacher's, except `intermediate_size`, which then keeps the
    teacher's ratio to `hidden_size` (4 for BERT and its kin, less for gated FFNs). The number of key-value heads stays
    if it divides `num_heads`, else their greatest common divisor is taken; a head dimension that the config sets apart
    from hidden_size / num_heads stays too. Layers are never left out at random (wav2vec 2.0's layerdrop is 0).

    `init`:
    - "layers": copies the teacher, of its layers `teacher_layers` (from 1, bottom to top), by default evenly with the
      last included (2, 4, ..., 12 for 6 of 12).
    - "slice": as "layers", and of every parameter the first rows and columns, so the student may be narrower.
    - "pca": of the embeddings (words, positions, token types) the projection on the leading principal components of
      the teacher's word embeddings, the rest as "random". The components are those of the centred words; the tables
      are multiplied by them as they are, so that their mean is projected too, not subtracted, and the sum of the tables
      is the projection of the teacher's sum. Nothing is rescaled: inner products are the teacher's, less what lies
      outside of the components. For narrower students; an equal width is a rotation.
    - "random": the class's own initialisation.
    - "auto": "layers" where layers, width, heads and FFN allow, else "random".

    With `seed` the same student comes out every time and the global generator is left as it was.
    Raises `ValueError` for sizes that do not divide, for more layers than the teacher has to give, for "slice" and
    "pca" to a wider student, for "pca" without word embeddings, and for `with_head` where the teacher has none.
    """
    if init not in get_args(Init):
        raise UsageError(f"init {init!r} is none of {', '.join(get_args(Init))}")
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "intermediate_size": intermediate_size}
    for name, size in {"num_layers": num_layers, **sizes}.items():
        if size is not None and size < 1:
            raise UsageError(f"{name} is {size}: it must be at least 1")
    base = base_of(teacher)
    if with_head and teacher is base:
        raise UsageError(f"the teacher is a {type(teacher).__name__}, which has no head for the student to have")
    layers = _choose_layers(base, num_layers, teacher_layers)
    config = _student_config(base, layers, hidden_size, num_heads, intermediate_size)

    init = _resolve_init(init, base, config, teacher_layers, len(layers))
    source = teacher if with_head else base
    with torch.device("cpu"), seeded(seed):
        student = type(source)(config)
    if init in ("layers", "slice"):
        copy_weights(source, student, layers)
    elif init == "pca":
        project_embeddings(base, base_of(student))
    return student


def _resolve_init(
    init: Init, base: PreTrainedModel, config: Any, teacher_layers: Sequence[int] | None, count: int
) -> Init:
    """What "auto" comes to, or the same; raises `ValueError` for a start that teacher and sizes do not allow."""
    available, wanted = widths(base.config), widths(config)
    enough_layers = count <= layers_of(base)
    if init == "auto":
        init = "layers" if available == wanted and enough_layers else "random"
    copies_layers = init in ("layers", "slice")
    if teacher_layers is not None and not copies_layers:
        raise UsageError(f"teacher_layers {list(teacher_layers)} is given, but the student's layers start random")
    if copies_layers and not enough_layers:
        raise UsageError(f"init {init!r} takes {count} layers from a teacher that has {layers_of(base)}")
    for name in available:
        if init == "layers" and wanted[name] != available[name]:
            raise UsageError(f"init 'layers' copies {name} {available[name]}, the student's is {wanted[name]}")
        if init == "slice" and name != "num_heads" and wanted[name] > available[name]:
            raise UsageError(f"init 'slice' cannot widen {name} from {available[name]} to {wanted[name]}")
    if init == "pca":
        check_projection(base, config)
    return init


def freeze_unused(student: PreTrainedModel, relations: Iterable[str] = ("qk", "vv")) -> list[str]:
    """Set `requires_grad=False` on what `relations` of the last layer never train; returns those parameters' names.

    That is the last layer after its projections (attention output, FFN, norms), a final norm, the pooler, and the value
    projection if no relation has a "v": the authors' design (microsoft/unilm#525).

    Raises as `freeze_unreached`.
    """
    used = set("".join(relations))
    last = layers_of(student)
    with torch.enable_grad():
        qkv = observe_probe(student, Needs(qkv=(-1,))).qkv[-1]
    total = sum(x.float().sum() for name, x in zip("qkv", qkv, strict=True) if name in used)
    return freeze_unreached(student, total, last)


def freeze_unreached(student: PreTrainedModel, loss: Tensor | int, layer: int) -> list[str]:
    """Set `requires_grad=False` on what has no gradient of `loss`; returns those parameters' names.

    They stay as initialised, and DDP runs without `find_unused_parameters`.

    Args:
        layer: the highest, from 1, of which the loss takes something.

    Raises:
        ValueError: a layer below that one of which nothing is reached, so that the gradient is cut on its way down.
    """
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(cast(Tensor, loss), list(trainable.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    _check_layers_below(student, layer, trainable.keys(), set(unused))
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


def observe_probe(model: PreTrainedModel, needs: Needs) -> Observed:
    """What is needed of a model for the shortest input it takes, in eval mode. Raises `ValueError` if it fails."""
    inputs = probe_inputs(model)
    with evaluating(model), model_tried(model, f"run on {model.main_input_name} alone", but=(ValueError,)):
        return observe(model, inputs, needs)


def _check_layers_below(student: PreTrainedModel, layer: int, trainable: Iterable[str], unused: set[str]) -> None:
    names = list(trainable)
    for path in stacks_of(student, layers_of(student)):
        for index in range(layer - 1):
            of_layer = [name for name in names if name.startswith(f"{path}.{index}.")]
            if of_layer and unused.issuperset(of_layer):
                raise UsageError(
                    f"what is learnt of layer {layer} of {type(student).__name__} reaches nothing in its "
                    f"layer {index + 1} ({path}.{index}): is the gradient cut between them, or does the layer not run?"
                )


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the base model, as the papers count them: "embedding", "transformer" and their sum, "total".

    Embedding is all that lies in the model's `embeddings` (tables, their norm, patches) or in an `nn.Embedding`. The
    pooler and heads are left out; shared parameters count once.
    """
    base = base_of(model)
    tables = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    embedding = transformer = 0
    for name, parameter in base.named_parameters():
        top = name.split(".")[0]
        if top == "embeddings" or id(parameter) in tables:
            embedding += parameter.numel()
        elif top != "pooler":
            transformer += parameter.numel()
    return {"embedding": embedding, "transformer": transformer, "total": embedding + transformer}


def _choose_layers(teacher: PreTrainedModel, count: int | None, teacher_layers: Sequence[int] | None) -> list[int]:
    """For each student layer the teacher's layer, from 1, that it starts from and whose kind of attention it has."""
    available = layers_of(teacher)
    if teacher_layers is not None:
        if count not in (None, len(teacher_layers)):
            raise UsageError(f"teacher_layers names {len(teacher_layers)} layers, num_layers is {count}")
        return [resolve_layer(teacher, layer) for layer in teacher_layers]
    count = count or available
    if count > available:
        return [i % available + 1 for i in range(count)]
    return [(i + 1) * available // count for i in range(count)]


def _student_config(
    base: PreTrainedModel,
    layers: list[int],
    hidden_size: int | None,
    num_heads: int | None,
    intermediate_size: int | None,
) -> Any:
    """A fresh config with the student's sizes (`to_dict` leaves out the attention implementation)."""
    if not isinstance(base.config.num_attention_heads, int):
        raise UsageError(
            f"{type(base).__name__} has {base.config.num_attention_heads} heads, by stage: "
            "a student is built of layers that are alike"
        )
    teacher: Any = base.config
    values = teacher.to_dict()
    for name in ("architectures", "dtype", "quantization_config", "_name_or_path", *_STAGES):
        values.pop(name, None)
    width = hidden_size or teacher.hidden_size
    heads = num_heads or teacher.num_attention_heads

    def put(name: str, value: int) -> None:
        values[teacher.attribute_map.get(name, name)] = value

    put("num_hidden_layers", len(layers))
    put("hidden_size", width)
    put("num_attention_heads", heads)
    for name in _WIDTH_FOLLOWERS:
        if values.get(name) == teacher.hidden_size:
            values[name] = width

    if head_dim(teacher) * teacher.num_attention_heads == teacher.hidden_size:
        if width % heads:
            raise UsageError(f"hidden_size {width} is not divisible by num_heads {heads}")
        if values.get("head_dim") is not None:
            put("head_dim", width // heads)
    if "num_key_value_heads" in values:
        groups = kv_heads(teacher)
        values["num_key_value_heads"] = math.gcd(heads, groups) if groups != teacher.num_attention_heads else heads

    ffn = next((name for name in FFN_NAMES if name in values), None)
    if intermediate_size is not None:
        if ffn is None:
            raise UsageError(f"the config of {teacher.model_type!r} names no FFN size: leave out intermediate_size")
        values[ffn] = intermediate_size
    elif ffn is not None and values[ffn] is not None:
        values[ffn] = round(values[ffn] * width / teacher.hidden_size)
    for name in ("layerdrop", "encoder_layerdrop"):  # a relation's layer must run in every step
        if name in values:
            values[name] = 0.0
    for name in _BY_LAYER:
        if values.get(name):
            of_teacher = _attention_types(base, values[name]) if name == "layer_types" else values[name]
            values[name] = [of_teacher[layer - 1] for layer in layers]
    return type(teacher).from_dict(values)


def _attention_types(teacher: PreTrainedModel, in_config: list[str]) -> list[str]:
    """Sliding or full attention, layer by layer: as a layer says itself, which it keeps where others were taken out."""
    stacks = stacks_of(teacher, layers_of(teacher))
    layers = cast(nn.ModuleList, teacher.get_submodule(stacks[0])) if stacks else in_config
    return [getattr(layer, "attention_type", named) for layer, named in zip(layers, in_config, strict=False)]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Only the CPU's generator: the student is made there."""
    if seed is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
