"""Students: smaller models of the teacher's class, what of them relation training leaves out, and their size."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.models.capture import attention_qkv, resolve_layer
from minilm.models.capture import num_layers as layers_of
from minilm.models.heads import forward_with_output
from minilm.models.probes import base_of, evaluating, model_tried, probe_inputs

Init = Literal["auto", "random", "layers", "slice", "pca"]

# In no attribute_map of transformers.
_FFN_NAMES = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim")
_WIDTH_FOLLOWERS = ("embedding_size", "pooler_output_size")  # follow hidden_size where they were equal to it
_STAGES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")  # layers of a backbone
_BY_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "no_rope_layers", "layers_block_type")
_FUSED = {  # equal parts that a projection stacks in one weight
    "Wqkv": (3, "attention width"),
    "c_attn": (3, "attention width"),
    "Wi": (2, "intermediate_size"),
    "gate_up_proj": (2, "intermediate_size"),
}


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
        raise ValueError(f"init {init!r} is none of {', '.join(get_args(Init))}")
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "intermediate_size": intermediate_size}
    for name, size in {"num_layers": num_layers, **sizes}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    base = base_of(teacher)
    if with_head and teacher is base:
        raise ValueError(f"the teacher is a {type(teacher).__name__}, which has no head for the student to have")
    if not isinstance(base.config.num_attention_heads, int):
        raise ValueError(
            f"{type(base).__name__} has {base.config.num_attention_heads} heads, by stage: "
            "a student is built of layers that are alike"
        )
    layers = _choose_layers(base, num_layers, teacher_layers)
    config = _student_config(base, layers, hidden_size, num_heads, intermediate_size)

    available, wanted = _widths(base.config), _widths(config)
    enough_layers = len(layers) <= layers_of(base)
    if init == "auto":
        init = "layers" if available == wanted and enough_layers else "random"
    copies_layers = init in ("layers", "slice")
    if teacher_layers is not None and not copies_layers:
        raise ValueError(f"teacher_layers {list(teacher_layers)} is given, but the student's layers start random")
    if copies_layers and not enough_layers:
        raise ValueError(f"init {init!r} takes {len(layers)} layers from a teacher that has {layers_of(base)}")
    for name in available:
        if init == "layers" and wanted[name] != available[name]:
            raise ValueError(f"init 'layers' copies {name} {available[name]}, the student's is {wanted[name]}")
        if init == "slice" and name != "num_heads" and wanted[name] > available[name]:
            raise ValueError(f"init 'slice' cannot widen {name} from {available[name]} to {wanted[name]}")
    if init == "pca":
        _check_projection(base, config)

    source = teacher if with_head else base
    with torch.device("cpu"), _seeded(seed):
        student = type(source)(config)
    if copies_layers:
        _copy_weights(source, student, layers)
    elif init == "pca":
        _project_embeddings(base, base_of(student))
    return student


def freeze_unused(
    student: PreTrainedModel, relations: Iterable[str] = ("qk", "vv"), *, output: bool = False
) -> list[str]:
    """Set `requires_grad=False` on what `relations` of the last layer never train; returns those parameters' names.

    With `output` the student's head is trained as well, and only what neither reaches is frozen.

    That is the last layer after its projections (attention output, FFN, norms), a final norm, the pooler, and the value
    projection if no relation has a "v": the authors' design (microsoft/unilm#525). They stay as initialised, and DDP
    runs without `find_unused_parameters`. Found by one forward and backward on two tokens (or one image).

    Raises:
        ValueError: a layer below the last of which nothing is reached, so that the gradient is cut on its way down.
    """
    used = set("".join(relations))
    with evaluating(student), torch.enable_grad():
        heads: tuple[Tensor | None, ...] = ()
        inputs = probe_inputs(student)
        with model_tried(student, f"run on {student.main_input_name} alone", but=(ValueError,)):
            if output:
                qkv, heads = forward_with_output(student, inputs)
            else:
                qkv = attention_qkv(student, inputs)
        reached = [tensor for name, tensor in zip("qkv", qkv, strict=True) if name in used]
        total = sum(tensor.float().sum() for tensor in (*reached, *heads) if tensor is not None)
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(cast(Tensor, total), list(trainable.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    _check_layers_below(student, trainable.keys(), set(unused))
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


def ends_as_teacher(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Whether all that `freeze_unused` froze of a base model, but for the pooler, is that of the teacher's last layer.

    Then nothing is untrained: relations train what lies below, and what lies above knows the teacher's last layer.
    """
    given, last = teacher.state_dict(), [layers_of(teacher)] * layers_of(student)
    stacks = _stacks(student, layers_of(student))
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad and not name.startswith("pooler."):
            source = given.get(_teacher_name(stacks, name, last))
            if source is None or not torch.equal(source, parameter.to(source)):
                return False
    return True


def _check_layers_below(student: PreTrainedModel, trainable: Iterable[str], unused: set[str]) -> None:
    names = list(trainable)
    for path in _stacks(student, layers_of(student)):
        for index in range(layers_of(student) - 1):
            of_layer = [name for name in names if name.startswith(f"{path}.{index}.")]
            if of_layer and unused.issuperset(of_layer):
                raise ValueError(
                    f"the relations of layer {layers_of(student)} of {type(student).__name__} reach nothing in its "
                    f"layer {index + 1} ({path}.{index}): is the gradient cut between them, or does the layer not run?"
                )


def _stacks(model: nn.Module, depth: int) -> list[str]:
    """The paths of the outermost lists of `depth` modules: the layers, and what else has as many parts."""
    paths: list[str] = []
    for path, module in model.named_modules():
        is_stack = isinstance(module, nn.ModuleList) and len(module) == depth
        if is_stack and not any(path.startswith(outer + ".") for outer in paths):
            paths.append(path)
    return paths


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
            raise ValueError(f"teacher_layers names {len(teacher_layers)} layers, num_layers is {count}")
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

    if _head_dim(teacher) * teacher.num_attention_heads == teacher.hidden_size:
        if width % heads:
            raise ValueError(f"hidden_size {width} is not divisible by num_heads {heads}")
        if values.get("head_dim") is not None:
            put("head_dim", width // heads)
    if "num_key_value_heads" in values:
        kv_heads = _kv_heads(teacher)
        grouped = kv_heads != teacher.num_attention_heads
        values["num_key_value_heads"] = math.gcd(heads, kv_heads) if grouped else heads

    ffn = next((name for name in _FFN_NAMES if name in values), None)
    if intermediate_size is not None:
        if ffn is None:
            raise ValueError(f"the config of {teacher.model_type!r} names no FFN size: leave out intermediate_size")
        values[ffn] = intermediate_size
    elif ffn is not None and values[ffn] is not None:
        values[ffn] = round(values[ffn] * width / teacher.hidden_size)
    for name in ("layerdrop", "encoder_layerdrop"):  # a relation's layer must run in every step
        if name in values:
            values[name] = 0.0
    for name in _BY_LAYER:
        if values.get(name):
            of_teacher = _kinds(base, values[name]) if name == "layer_types" else values[name]
            values[name] = [of_teacher[layer - 1] for layer in layers]
    return type(teacher).from_dict(values)


def _kinds(teacher: PreTrainedModel, in_config: list[str]) -> list[str]:
    """Sliding or full attention, layer by layer: as a layer says itself, which it keeps where others were taken out."""
    stacks = _stacks(teacher, layers_of(teacher))
    layers = cast(nn.ModuleList, teacher.get_submodule(stacks[0])) if stacks else in_config
    return [getattr(layer, "attention_type", kind) for layer, kind in zip(layers, in_config, strict=False)]


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _widths(config: Any) -> dict[str, int]:
    """Every number of rows or columns of a parameter in which teacher and student may differ."""
    ffn = next((getattr(config, name) for name in _FFN_NAMES if getattr(config, name, None)), None)
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": ffn or int(config.hidden_size * getattr(config, "mlp_ratio", 4)),
        "num_heads": config.num_attention_heads,
        "head_dim": _head_dim(config),
        "attention width": config.num_attention_heads * _head_dim(config),
        "key-value width": _kv_heads(config) * _head_dim(config),
    }


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, layers: list[int]) -> None:
    """Copy into the student, cutting where it is narrower. What the teacher lacks (a pooler) stays as initialised."""
    have, want = _widths(teacher.config), _widths(student.config)
    depth = layers_of(teacher)
    stacks = [path for path in _stacks(student, len(layers)) if path in _stacks(teacher, depth)]
    given = teacher.state_dict()
    for name, target in student.state_dict().items():
        source = given.get(_teacher_name(stacks, name, layers))
        # What only the first layer holds (T5's position bias) or lacks (ModernBERT's norm) has no namesake there.
        source = given.get(name) if source is None else source
        if source is not None:
            if name.endswith("contact_head.regression.weight"):  # ESM's, (1, layers * heads)
                by_layer = source.unflatten(1, (depth, -1))
                source = by_layer[:, [layer - 1 for layer in layers], : want["num_heads"]].flatten(1)
            target.copy_(_cut(name, source, target.shape, have, want))


def _check_projection(teacher: PreTrainedModel, config: Any) -> None:
    words = teacher.get_input_embeddings()
    if not isinstance(words, nn.Embedding):
        raise ValueError(f"init 'pca' projects word embeddings, {type(teacher).__name__} has none")
    wanted = getattr(config, "embedding_size", config.hidden_size)
    if wanted > words.embedding_dim:
        raise ValueError(f"init 'pca' cannot widen the embeddings from {words.embedding_dim} to {wanted}")


@torch.no_grad()
def _project_embeddings(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    words, narrow = (cast(nn.Embedding, model.get_input_embeddings()) for model in (teacher, student))
    centred = words.weight.double() - words.weight.double().mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : narrow.embedding_dim]
    for name, table in teacher.named_modules():
        if isinstance(table, nn.Embedding) and table.embedding_dim == words.embedding_dim:
            student.get_parameter(f"{name}.weight").copy_(table.weight.double() @ components)


def _teacher_name(stacks: list[str], name: str, layers: list[int]) -> str:
    """`encoder.layer.0.x` -> `encoder.layer.1.x` where the student's first layer comes from the teacher's second."""
    for path in stacks:
        if name.startswith(path + "."):
            index, rest = name[len(path) + 1 :].split(".", 1)
            return f"{path}.{layers[int(index)] - 1}.{rest}"
    return name


def _cut(name: str, source: Tensor, shape: torch.Size, have: dict[str, int], want: dict[str, int]) -> Tensor:
    """The first `shape` entries of `source`, of each part where a projection stacks several."""
    parts, stacked = next((fused for module, fused in _FUSED.items() if f".{module}." in name), (1, ""))
    narrower = {(have[width], want[width]) for width in have if want[width] <= have[width]}
    for axis, (rows, kept) in enumerate(zip(source.shape, shape, strict=True)):
        if stacked and (rows, kept) == (parts * have[stacked], parts * want[stacked]):
            source = torch.cat([part.narrow(axis, 0, kept // parts) for part in source.chunk(parts, axis)], axis)
        elif rows == kept or (rows, kept) in narrower:
            source = source.narrow(axis, 0, kept)
        else:
            raise ValueError(f"init 'slice' does not know how to cut {name} from {rows} to {kept}")
    return source


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
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
