"""Relations and maps of layers, as they are written on a command line."""

import math

from minilm.errors import UsageError
from minilm.values import FLOAT32_MAX


def parse_relations(text: str) -> dict[str, float]:
    """Weights by relation from "qk,vv" (1 each) or "qk:1,vv:0.5".

    >>> parse_relations("qk,vv:0.5")
    {'qk': 1.0, 'vv': 0.5}
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        relation, colon, weight = item.strip().partition(":")
        if relation in weights:
            raise UsageError(f"relation {relation!r} stands twice in {text!r}")
        try:
            weights[relation] = float(weight) if colon else 1.0
        except ValueError:
            raise UsageError(f"the weight {weight!r} of relation {relation!r} in {text!r} is no number") from None
        if math.isfinite(weights[relation]) and weights[relation] > FLOAT32_MAX:
            raise UsageError(f"the weight {weight} of relation {relation!r} must be at most {FLOAT32_MAX:.7g}")
    return weights


def parse_layer_map(text: str) -> dict[int, int]:
    """The student's layers, each with the teacher's, from "student:teacher" pairs.

    >>> parse_layer_map("1:4,2:8,-1:-1")
    {1: 4, 2: 8, -1: -1}
    """
    layers: dict[int, int] = {}
    for item in text.split(","):
        student, _, teacher = item.partition(":")
        try:
            pair = int(student), int(teacher)
        except ValueError:
            raise UsageError(f"{item.strip()!r} in {text!r} is no pair of layers, student:teacher, as in 1:4") from None
        if pair[0] in layers:
            raise UsageError(f"student layer {pair[0]} stands twice in {text!r}")
        layers[pair[0]] = pair[1]
    return layers


def parse_layers(text: str) -> list[int]:
    """Layers in their order.

    >>> parse_layers("1,3,-1")
    [1, 3, -1]
    """
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} are no layers with commas between them, as in 1,3,6") from None
