"""The mean squared error of hidden states: as the papers write it, on random states with padding."""

import pytest
import torch
from torch import Tensor, nn

from minilm.models.observe import Observed
from minilm.objectives.hidden_mse import HiddenMSE

LAYERS = {0: 0, 1: 2, 2: 4}
LENGTHS = (7, 3, 0, 5)
MASK = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long()


def states(width: int, layers: tuple[int, ...], seed: int) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(4, 8, width, generator=draw, requires_grad=True) for layer in layers}


def as_written(student: Tensor, teacher: Tensor, weight: Tensor | None, normalised: bool) -> Tensor:
    """Token by token in float64."""
    errors = []
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            mine, theirs = student[row, token].double(), teacher[row, token].detach().double()
            mine = mine if weight is None else weight.double() @ mine
            if normalised:
                mine, theirs = ((x - x.mean()) / x.var(unbiased=False).sqrt() for x in (mine, theirs))
            errors.append((mine - theirs).square())
    return torch.stack(errors).mean()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert (actual.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("width", "normalised"), [(6, False), (6, True), (10, False)])
def test_loss_and_gradients_are_those_of_the_formula(width: int, normalised: bool) -> None:
    """With padding that holds NaN."""
    torch.manual_seed(0)
    projection = None if normalised else nn.Linear(width, 6, bias=False)
    term = HiddenMSE(LAYERS, projection, normalised)
    teacher, student = states(6, (0, 2, 4), 1), states(width, (0, 1, 2), 2)
    weight = None if projection is None else projection.weight
    expected = {
        name: as_written(student[mine], teacher[theirs], weight, normalised)
        for name, (mine, theirs) in zip(("embedding", "hidden_1", "hidden_2"), LAYERS.items(), strict=True)
    }
    learnt = [*student.values(), *term.parameters()]
    gradients = torch.autograd.grad(torch.stack(list(expected.values())).sum(), learnt)
    with torch.no_grad():
        for state in (*teacher.values(), *student.values()):
            state[MASK == 0] = float("nan")
    loss, parts = term(Observed({}, teacher), Observed({}, student), {"attention_mask": MASK})
    assert parts.keys() == term.parts.keys() == expected.keys()
    for name, part in parts.items():
        assert part.dtype == torch.float32
        assert not part.requires_grad
        assert_near(part, expected[name])
    assert_near(loss, torch.stack(list(expected.values())).sum())
    for actual, gradient in zip(torch.autograd.grad(loss, learnt, retain_graph=True), gradients, strict=True):
        assert_near(actual, gradient)
    assert all(x is None for x in torch.autograd.grad(loss, list(teacher.values()), allow_unused=True))


def test_padding_is_no_part_of_the_mean() -> None:
    """As it is in TinyBERT's own code, which divides by all places."""
    teacher, student = torch.ones(4, 8, 3), torch.zeros(4, 8, 3)
    loss, _ = HiddenMSE({1: 1})(Observed({}, {1: teacher}), Observed({}, {1: student}), {"attention_mask": MASK})
    assert loss.item() == 1.0


def test_half_precision_and_autocast_give_float32_and_float64_stays() -> None:
    teacher, student = states(6, (1,), 1), states(6, (1,), 2)
    plain, term = HiddenMSE({1: 1}), HiddenMSE({1: 1}, nn.Linear(6, 6, bias=False))
    for criterion, dtype, autocast in ((plain, torch.bfloat16, False), (term, torch.float32, True)):
        exact = criterion(Observed({}, teacher), Observed({}, student), {"attention_mask": MASK})[0].item()
        given = [Observed({}, {1: state[1].to(dtype)}) for state in (teacher, student)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = criterion(*given, {"attention_mask": MASK})
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=1e-2)
    given = [Observed({}, {1: state[1].double()}) for state in (teacher, student)]
    loss, _ = term.double()(*given, {"attention_mask": MASK})
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(exact, rel=1e-6)


def test_a_batch_of_padding_alone_gives_0_and_a_packed_row_counts_its_tokens() -> None:
    teacher, student = states(6, (1,), 1), states(6, (1,), 2)
    given = Observed({}, teacher), Observed({}, student)
    loss, _ = HiddenMSE({1: 1})(*given, {"attention_mask": torch.zeros(4, 8)})
    (gradient,) = torch.autograd.grad(loss, student[1])
    assert (loss.item(), gradient.abs().max().item()) == (0, 0)
    padded, _ = HiddenMSE({1: 1})(*given, {"attention_mask": MASK})
    packed, _ = HiddenMSE({1: 1})(*given, {"sequence_ids": MASK * torch.arange(1, 9)})
    assert torch.equal(packed, padded)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"layers is \{\}"):
        HiddenMSE({})
    given = Observed({}, states(6, (1,), 1)), Observed({}, states(5, (1,), 2))
    with pytest.raises(ValueError, match="student are 5 wide, those of the teacher 6"):
        HiddenMSE({1: 1})(*given, {})
