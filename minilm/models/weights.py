"""How a student's weights follow from its teacher's: copied layer by layer, cut where it is narrower, or projected."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.layers import num_layers as layers_of
from minilm.models.layers import numbered

# In no attribute_map of transformers.
FFN_NAMES = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim")
_FUSED = {  # equal parts that a projection stacks in one weight
    "Wqkv": (3, "attention width"),
    "c_attn": (3, "attention width"),
    "Wi": (2, "intermediate_size"),
    "gate_up_proj": (2, "intermediate_size"),
}


def stacks_of(model: nn.Module, depth: int) -> list[str]:
    """The paths of the outermost lists of `depth` modules: the layers, and what else has as many parts."""
    paths: list[str] = []
    for path, module in model.named_modules():
        is_stack = isinstance(module, nn.ModuleList) and len(module) == depth
        if is_stack and not any(path.startswith(outer + ".") for outer in paths):
            paths.append(path)
    return paths


def _teacher_name(stacks: list[str], name: str, layers: list[int]) -> str:
    """`encoder.layer.0.x` -> `encoder.layer.1.x` where the student's first layer comes from the teacher's second."""
    for path in stacks:
        if name.startswith(path + "."):
            index, rest = name[len(path) + 1 :].split(".", 1)
            return f"{path}.{layers[int(index)] - 1}.{rest}"
    return name


def ends_as_teacher(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Whether all that `freeze_unused` froze of a base model, but for the pooler, is that of the teacher's last layer.

    Then nothing is untrained: relations train what lies below, and what lies above knows the teacher's last layer.
    """
    given, last = teacher.state_dict(), [layers_of(teacher)] * layers_of(student)
    stacks = stacks_of(student, layers_of(student))
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad and not name.startswith("pooler."):
            source = given.get(_teacher_name(stacks, name, last))
            if source is None or not torch.equal(source, parameter.to(source)):
                return False
    return True


def copy_ends(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Copy what lies outside of the layers, embeddings and head, where its sizes are the teacher's."""
    given = teacher.state_dict()
    stacks = tuple(f"{path}." for path in stacks_of(student, layers_of(student)))
    for name, target in student.state_dict().items():
        source = given.get(name)
        if source is not None and source.shape == target.shape and not name.startswith(stacks):
            target.copy_(source)


def learning_rate_factors(
    teacher: PreTrainedModel, student: PreTrainedModel, layer: int, of_lower: float
) -> dict[str, float]:
    """What of the learning rate the parameters have, by name, while the student's `layer` learns.

    Those of the layers below have `of_lower`. What lies outside of the layers has 0 where it is the teacher's own, and
    else the rate of layer 1: embeddings that are not the teacher's learn with it.
    """
    number_of = {id(p): max(numbers) for module, numbers in numbered(student) for p in module.parameters()}
    given = dict(teacher.named_parameters())
    factors: dict[str, float] = {}
    for name, parameter in student.named_parameters():
        source = given.get(name)
        if id(parameter) not in number_of and source is not None and torch.equal(source, parameter.to(source)):
            factors[name] = 0.0
        elif number_of.get(id(parameter), 1) < layer:
            factors[name] = of_lower
    return factors


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def widths(config: Any) -> dict[str, int]:
    """Every number of rows or columns of a parameter in which teacher and student may differ."""
    ffn = next((getattr(config, name) for name in FFN_NAMES if getattr(config, name, None)), None)
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": ffn or int(config.hidden_size * getattr(config, "mlp_ratio", 4)),
        "num_heads": config.num_attention_heads,
        "head_dim": head_dim(config),
        "attention width": config.num_attention_heads * head_dim(config),
        "key-value width": kv_heads(config) * head_dim(config),
    }


def copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, layers: list[int]) -> None:
    """Copy into the student, cutting where it is narrower. What the teacher lacks (a pooler) stays as initialised."""
    have, want = widths(teacher.config), widths(student.config)
    depth = layers_of(teacher)
    stacks = [path for path in stacks_of(student, len(layers)) if path in stacks_of(teacher, depth)]
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


def check_projection(teacher: PreTrainedModel, config: Any) -> None:
    words = teacher.get_input_embeddings()
    if not isinstance(words, nn.Embedding):
        raise UsageError(f"init 'pca' projects word embeddings, {type(teacher).__name__} has none")
    wanted = getattr(config, "embedding_size", config.hidden_size)
    if wanted > words.embedding_dim:
        raise UsageError(f"init 'pca' cannot widen the embeddings from {words.embedding_dim} to {wanted}")


@torch.no_grad()
def project_embeddings(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    words, narrow = (cast(nn.Embedding, model.get_input_embeddings()) for model in (teacher, student))
    centred = words.weight.double() - words.weight.double().mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : narrow.embedding_dim]
    for name, table in teacher.named_modules():
        if isinstance(table, nn.Embedding) and table.embedding_dim == words.embedding_dim:
            student.get_parameter(f"{name}.weight").copy_(table.weight.double() @ components)


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
            raise UsageError(f"init 'slice' does not know how to cut {name} from {rows} to {kept}")
    return source
