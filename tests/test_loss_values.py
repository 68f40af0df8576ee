"""The loss against a loop over sequences, heads and tokens, as the papers write it, in float64.

MiniLM (Wang et al. 2020), for sequence x with A_h heads and the student's last layer M, the teacher's last layer L:
    eq. 6    L_AT = 1/(A_h |x|) sum_a sum_t KL(A^T_{L,a,t} || A^S_{M,a,t}),     A = softmax(Q K^T / sqrt(d_k))
    eq. 7-9  L_VR = the same of VR = softmax(V V^T / sqrt(d_k))
    eq. 10   L = L_AT + L_VR
MiniLMv2 (2021), eq. 5 to 7: any pair of Q, K, V, over A_r relation heads of the concatenated heads. Both are means over
the sequences of a batch.
"""

import math
from itertools import pairwise

import pytest
import torch
from loss_cases import Case, Inputs, build, evaluate
from torch import Tensor

Sequences = list[tuple[int, list[int]]]  # row of the tensor, positions of the sequence's tokens in it


def one_head(x: Tensor, tokens: list[int], head: int, heads: int) -> list[list[float]]:
    """A token's heads concatenated, split again into `heads`, one of them: a list of vectors."""
    together = torch.cat([x[h, tokens] for h in range(x.shape[0])], dim=1)
    width = together.shape[1] // heads
    return together[:, head * width : (head + 1) * width].tolist()


def repeated(x: Tensor, heads: int) -> Tensor:
    """Grouped heads: head h of the queries meets head h // (heads / groups) of the keys."""
    return torch.stack([x[h // (heads // x.shape[0])] for h in range(heads)])


def log_distribution(x: list[float], keys: list[list[float]], scale: float | None, temperature: float) -> list[float]:
    factor = (1 / math.sqrt(len(x)) if scale is None else scale) / temperature
    scores = [factor * sum(a * b for a, b in zip(x, y, strict=True)) for y in keys]
    log_sum = max(scores) + math.log(sum(math.exp(score - max(scores)) for score in scores))
    return [score - log_sum for score in scores]


def sequence_rows(inputs: Inputs, relation: str, row: int, tokens: list[int]) -> list[list[float]]:
    """KL of every token, per relation head, of one sequence."""
    options = inputs.options
    sides = []
    for triple in (inputs.teacher, inputs.student):
        x, y = (triple["qkv".index(letter)][row].double() for letter in relation)
        model_heads = max(x.shape[0], y.shape[0])
        sides.append((repeated(x, model_heads), repeated(y, model_heads), options["relation_heads"] or model_heads))
    prefix = options["prefix_lengths"][row].item() if "prefix_lengths" in options else 0
    scale_t, scale_s = options["scale"] if isinstance(options["scale"], tuple) else (options["scale"],) * 2
    losses = []
    for head in range(sides[0][2]):
        (x_t, y_t), (x_s, y_s) = (
            (one_head(x, tokens, head, heads), one_head(y, tokens, head, heads)) for x, y, heads in sides
        )
        losses.append([])
        for i, here in enumerate(tokens):
            keys = [j for j, there in enumerate(tokens) if not options["causal"] or there <= here or there < prefix]
            log_p = log_distribution(x_t[i], [y_t[j] for j in keys], scale_t, options["temperature"])
            log_q = log_distribution(x_s[i], [y_s[j] for j in keys], scale_s, options["temperature"])
            losses[-1].append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
    return losses


def papers_loss(inputs: Inputs, relation: str, sequences: Sequences) -> float:
    """eq. 6 and 9, then the mean over the sequences that have tokens; "token" and "sum" as their names say."""
    rows = [sequence_rows(inputs, relation, row, tokens) for row, tokens in sequences if tokens]
    heads = len(rows[0])
    match inputs.options["reduction"]:
        case "sequence":
            means = [sum(map(sum, by_head)) / (heads * len(by_head[0])) for by_head in rows]
            return sum(means) / len(means)
        case "token":
            tokens = sum(len(by_head[0]) for by_head in rows)
            return sum(sum(map(sum, by_head)) for by_head in rows) / (heads * tokens)
        case "sum":
            return sum(sum(map(sum, by_head)) for by_head in rows)
    raise ValueError(inputs.options["reduction"])


def sequences_of(inputs: Inputs) -> Sequences:
    batch, _, n, _ = inputs.teacher[0].shape
    if "cu_seqlens" in inputs.options:
        edges = inputs.options["cu_seqlens"].tolist()
        return [(0, list(range(a, b))) for a, b in pairwise(edges)]
    mask = inputs.options.get("attention_mask", torch.ones(batch, n))
    return [(row, mask[row].nonzero().flatten().tolist()) for row in range(batch)]


SMALL = {"teacher": (2, 2, 6), "student": (2, 2, 5)}
CASES = [
    Case(id="MiniLM", n=7, batch=2, **SMALL),
    Case(id="MiniLMv2", n=7, teacher=(4, 4, 6), student=(2, 2, 9), relations=("qq", "kk", "vv"), relation_heads=3),
    Case(id="right", n=7, batch=3, masks=("right", "full", "one"), **SMALL),
    Case(id="left and holes", n=9, batch=3, masks=("left", "holes", "empty"), **SMALL),
    Case(id="causal", n=7, batch=2, causal=True, **SMALL),
    Case(id="causal holes", n=9, batch=2, causal=True, masks=("holes", "left"), **SMALL),
    Case(id="prefix", n=7, batch=3, causal=True, prefix=(0, 3, 7), **SMALL),
    Case(id="prefix masked", n=9, batch=2, causal=True, prefix=(6, 5), masks=("holes", "left"), **SMALL),
    Case(id="packed", n=13, packed=(0, 4, 4, 5, 11), **SMALL),
    Case(id="packed causal", n=13, packed=(0, 4, 4, 5, 11), causal=True, **SMALL),
    Case(id="grouped", n=7, teacher=(4, 2, 6), student=(4, 1, 5), relations=("qk", "kq", "qv"), masks=("holes",)),
    Case(
        id="grouped, re-split", n=7, teacher=(4, 2, 6), student=(6, 3, 4), relations=("qk", "vv"), relation_heads=3,
        layout="tokens first",
    ),
    Case(id="all nine", n=5, relations=tuple(x + y for x in "qkv" for y in "qkv"), **SMALL),
    Case(id="weighted", n=7, batch=2, relations=(("qk", 0.25), ("vv", 3.0)), temperature=1.7, **SMALL),
    Case(id="per token", n=7, batch=3, masks=("right", "empty", "one"), reduction="token", **SMALL),
    Case(id="per token, packed", n=13, packed=(0, 4, 4, 5, 11), reduction="token", **SMALL),
    Case(id="summed", n=7, batch=3, masks=("right", "empty", "one"), reduction="sum", **SMALL),
    Case(id="hundreds", n=7, size=15.0, relations=("qk", "kv"), **SMALL),
    Case(id="one scale", n=7, scale=0.7, temperature=1.3, **SMALL),
    Case(id="two scales", n=7, batch=2, scale=(0.3, 0.9), masks=("holes", "full"), **SMALL),
    Case(
        id="the student's scale, re-split", n=7, teacher=(4, 2, 6), student=(6, 3, 4), relation_heads=3,
        scale=(None, 1.1), layout="tokens first",
    ),
]  # fmt: skip


def exact_value(case: Case, device: str) -> float:
    inputs = build(case, device)
    relations = inputs.options["relations"]
    weights = relations if isinstance(relations, dict) else dict.fromkeys(relations, 1.0)
    return sum(w * papers_loss(inputs, name, sequences_of(inputs)) for name, w in weights.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reference_is_the_papers_loss(case: Case, device: str) -> None:
    loss = evaluate(build(case, device), "reference", torch.float64).loss
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(exact_value(case, device), rel=1e-11)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_implementation_is_the_papers_loss(case: Case, implementation: str, device: str) -> None:
    loss = evaluate(build(case, device), implementation).loss
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(exact_value(case, device), rel=2e-5)


def test_equal_distributions_cost_nothing(implementation: str, device: str) -> None:
    case = Case(id="equal", n=37, batch=2, masks=("holes", "right"), relations=("qk", "vv"))
    teacher = build(case, device).teacher
    outcome = evaluate(Inputs(teacher, teacher, build(case, device).options), implementation)
    assert outcome.loss.abs().item() <= 1e-7
    assert all(g.abs().max().item() <= 1e-8 for g in outcome.gradients)


def test_scores_and_not_vectors_are_compared(implementation: str, device: str) -> None:
    """A rotation of a model's heads leaves its relations, so the loss between the two is 0; a scaling does not."""
    case = Case(id="rotated", n=37, relations=("qk", "vv"))
    teacher, _, options = build(case, device)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    rotated = tuple((x.double() @ rotation.to(device)).float() for x in teacher)
    assert evaluate(Inputs(teacher, rotated, options), implementation).loss.abs().item() <= 1e-6
    scaled = tuple(2 * x for x in rotated)
    assert evaluate(Inputs(teacher, scaled, options), implementation).loss.item() > 0.1


def test_float64_student_gives_a_float64_loss(device: str) -> None:
    case = Case(id="double", n=7, dtypes=(torch.float32, torch.float64))
    for implementation in ("reference", "chunked"):
        outcome = evaluate(build(case, device), implementation)
        assert outcome.loss.dtype == torch.float64
        assert outcome.loss.item() == pytest.approx(exact_value(case, device), rel=1e-6)  # the teacher is float32
        assert all(g.dtype == torch.float64 for g in outcome.gradients)
