"""Reductions, weights of rows and of relations, and the module that holds the options."""

import pytest
import torch
from loss_cases import LOSS_FLOOR, Case, Inputs, assert_within_eager_error, build, check, evaluate
from torch import Tensor

from minilm import MiniLMLoss
from minilm_kernels import fused_minilm_loss, relation_kl

pytestmark = pytest.mark.usefixtures("nan_filled")

MASKS = ("right", "empty", "holes", "full")
SMALL = Case(id="reductions", n=19, batch=4, masks=MASKS)


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
@pytest.mark.parametrize("packed", [False, True])
def test_against_float64(reduction: str, packed: bool, fused: str, device: str) -> None:
    place = {"packed": (0, 7, 7, 30, 33)} if packed else {"batch": 4, "masks": MASKS}
    heads = {"teacher": (1, 1, 8), "student": (1, 1, 8)}
    check(Case(id="reduced", n=37, reduction=reduction, relations=("qk", "kk"), **heads, **place), fused, device)


def rows_of(inputs: Inputs, implementation: str) -> Tensor:
    (q_t, k_t, _), (q_s, k_s, _), options = inputs
    options = {"attention_mask": options["attention_mask"], "reduction": "none", "implementation": implementation}
    return relation_kl(q_t, k_t, q_s, k_s, **options)


def test_reductions_are_means_of_the_rows(implementation: str, device: str) -> None:
    inputs = build(SMALL, device)
    inputs.options["relations"] = ("qk",)
    rows = rows_of(inputs, implementation)
    token = inputs.options["attention_mask"]
    assert rows.shape == (4, 2, 19)
    assert rows.dtype == torch.float32
    assert rows.masked_select(~token.unsqueeze(1)).eq(0).all()
    assert rows.masked_select(token.unsqueeze(1)).gt(0).all()
    expected = {
        "sequence": torch.stack([rows[b][:, token[b]].mean() for b in (0, 2, 3)]).mean(),
        "token": rows.masked_select(token.unsqueeze(1)).mean(),
        "sum": rows.sum(),
    }
    for reduction, value in expected.items():
        inputs.options["reduction"] = reduction
        torch.testing.assert_close(evaluate(inputs, implementation).loss, value, rtol=1e-5, atol=0)


CROSS, SELF = "qk", "kk"


@pytest.mark.parametrize("relation", [CROSS, SELF])
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        Case(
            id="rows, causal", n=70, batch=2, teacher=(1, 1, 8), student=(1, 1, 6), masks=("holes", "left"), causal=True
        ),
        Case(id="rows, packed", n=70, teacher=(1, 1, 8), student=(1, 1, 6), packed=(0, 20, 20, 66)),
        Case(id="rows, heads", n=19, teacher=(2, 2, 12), student=(2, 2, 6), relation_heads=4),
        Case(id="rows, bf16", n=37, dtypes=(torch.bfloat16, torch.bfloat16)),
        Case(id="rows, wide", n=70, teacher=(2, 2, 136), masks=("holes",), dtypes=(torch.bfloat16, torch.bfloat16)),
        Case(id="rows, spread", n=70, teacher=(1, 1, 8), student=(1, 1, 8), spread=1.2),
    ],
    ids=lambda case: case.id,
)
def test_rows_under_any_weights(case: Case, relation: str, fused: str, device: str) -> None:
    """Rows, and their gradients under signed weights of several magnitudes, one of them 0, also at padding."""
    inputs = build(case, device)
    options = {name: x for name, x in inputs.options.items() if name != "relations"} | {"reduction": "none"}

    def rows_and_gradients(implementation: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        teacher, student = (
            [x.to(dtype or x.dtype) for x in (side["qkv".index(relation[0])], side["qkv".index(relation[1])])]
            for side in inputs[:2]
        )
        if relation == SELF:
            teacher[1], student[1] = teacher[0], student[0]
        leaves = [x.requires_grad_() for x in student[: len(set(relation))]]
        rows = relation_kl(*teacher, *student, **options, implementation=implementation)
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(rows.shape, generator=generator) * 10 ** torch.randn(rows.shape, generator=generator)
        weight[0, 0, 3] = 0
        return rows.detach(), *torch.autograd.grad(rows, leaves, weight.to(rows))

    (rows, *actual), (rows_eager, *eager) = rows_and_gradients(fused), rows_and_gradients("reference")
    rows_exact, *exact = rows_and_gradients("reference", torch.float64)
    assert_within_eager_error(rows, rows_eager, rows_exact, floor=LOSS_FLOOR * rows.numel() ** 0.5)
    largest = max(g.norm().item() for g in exact)
    for gradients in zip(actual, eager, exact, strict=True):
        assert_within_eager_error(*gradients, floor=1e-7 * largest)


def test_gradient_of_the_sum_is_the_sum_of_the_gradients(implementation: str, device: str) -> None:
    weights = {"qk": 0.25, "vv": 3.0, "kq": 1.0, "kk": 1.0}
    inputs = build(SMALL, device)
    inputs.options["relations"] = weights
    together = evaluate(inputs, implementation)
    loss, gradients = torch.zeros((), device=device), [torch.zeros_like(x) for x in inputs.student]
    for name, weight in weights.items():
        alone = evaluate(
            Inputs(inputs.teacher, inputs.student, inputs.options | {"relations": (name,)}), implementation
        )
        loss += weight * alone.loss
        for total, g in zip(gradients, alone.gradients, strict=True):
            total += 0 if g is None else weight * g
    torch.testing.assert_close(together.loss, loss, rtol=1e-6, atol=0)
    for g, total in zip(together.gradients, gradients, strict=True):
        torch.testing.assert_close(g, total, rtol=1e-5, atol=1e-6 * total.abs().max().item())


def test_weight_zero_leaves_a_relation_out(implementation: str, device: str) -> None:
    """Its tensors may then be None or hold anything, and get no gradient."""
    inputs = build(SMALL, device)
    inputs.options["relations"] = ("qk",)
    expected = evaluate(inputs, implementation)
    inputs.options["relations"] = {"vv": 0.0, "qk": 1.0, "qv": 0}
    actual = evaluate(inputs, implementation)
    assert torch.equal(actual.loss, expected.loss)
    assert actual.gradients[2] is None
    (q_t, k_t, _), (q_s, k_s, _), options = inputs
    without = fused_minilm_loss((q_t, k_t, None), (q_s, k_s, None), **options, implementation=implementation)
    assert torch.equal(without, expected.loss)


def test_y_is_x_marks_a_self_relation(implementation: str, device: str) -> None:
    """Also on one side only; the gradient of a tensor that stands on both sides of a relation is the sum of both."""
    (q_t, k_t, _), (q_s, k_s, _), _ = build(Case(id="marks", n=37, teacher=(1, 1, 8), student=(1, 1, 8)), device)
    for x_t, y_t in ((q_t, k_t), (q_t, q_t)):
        for x_s, y_s in ((q_s, k_s), (q_s, q_s)):
            x, y = x_s.clone().requires_grad_(), y_s.clone().requires_grad_()
            relation_kl(x_t, y_t.clone(), x, y, implementation=implementation).backward()
            x_marked = x_s.clone().requires_grad_()
            y_marked = x_marked if y_s is x_s else y_s.clone().requires_grad_()
            relation_kl(x_t, y_t, x_marked, y_marked, implementation=implementation).backward()
            expected = x.grad + y.grad if y_s is x_s else x.grad
            torch.testing.assert_close(x_marked.grad, expected, rtol=1e-4, atol=1e-7)


def test_relation_kl_is_a_relation_of_the_loss(implementation: str, device: str) -> None:
    inputs = build(SMALL, device)
    (q_t, k_t, v_t), (q_s, k_s, v_s), options = inputs
    options = {"attention_mask": options["attention_mask"], "temperature": 1.5, "scale": (0.6, 0.8)}
    options["implementation"] = implementation
    for name, sides in {"qk": (q_t, k_t, q_s, k_s), "kq": (k_t, q_t, k_s, q_s), "vv": (v_t, v_t, v_s, v_s)}.items():
        expected = fused_minilm_loss(inputs.teacher, inputs.student, relations=(name,), **options)
        assert torch.equal(relation_kl(*sides, **options), expected)


def test_module_is_the_function(implementation: str, device: str) -> None:
    inputs = build(
        Case(id="module", n=19, batch=3, causal=True, masks=("right", "holes", "left"), prefix=(4, 9, 0)), device
    )
    weights = {"qk": 0.5, "vv": 2.0}
    held = {"temperature": 1.3, "scale": (0.7, None), "reduction": "token", "relation_heads": 4, "causal": True}
    where = {name: inputs.options[name] for name in ("attention_mask", "prefix_lengths")}
    student = tuple(x.requires_grad_() for x in inputs.student)
    module = MiniLMLoss(weights, **held, implementation=implementation)
    loss, parts = module(inputs.teacher, student, **where)
    expected = fused_minilm_loss(inputs.teacher, student, weights, **held, **where, implementation=implementation)
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    assert list(parts) == ["qk", "vv"]
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(sum(weights[name] * part for name, part in parts.items()), loss.detach())
    for name, part in parts.items():
        alone = fused_minilm_loss(
            inputs.teacher, student, (name,), **held, **where, implementation=implementation
        )  # fmt: skip
        assert torch.equal(part, alone)


def test_module_takes_packed_sequences(implementation: str, device: str) -> None:
    inputs = build(Case(id="packed module", n=19, packed=(0, 5, 17)), device)
    loss, _ = MiniLMLoss(implementation=implementation)(
        inputs.teacher, inputs.student, cu_seqlens=inputs.options["cu_seqlens"]
    )
    assert torch.equal(loss, evaluate(inputs, implementation).loss)


def test_module_has_no_parameters_and_shows_its_options() -> None:
    module = MiniLMLoss(("qq", "kk"), relation_heads=48)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert "qq" in repr(module)
    assert "48" in repr(module)
