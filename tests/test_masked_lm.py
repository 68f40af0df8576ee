"""The masked LM's loss against eager code, in value, gradient and memory."""

from pathlib import Path

import pytest
import torch
from loss_cases import assert_within_eager_error
from test_outputs import heads, largest_and_peak, loss_and_gradients
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from minilm.models.heads import ExampleOutput, TokenOutput
from minilm.models.observe import Observed
from minilm.objectives import chunks
from minilm.objectives.masked_lm import MaskedLM, label_cross_entropy

NOTHING = Observed({}, {})


def student(rows: int, dtype: torch.dtype, device: str, vocabulary: int = 101) -> list[Tensor]:
    """Hidden states, weight and bias of a head."""
    return [x for x in heads(rows, vocabulary, dtype, device)[:3] if x is not None]


def targets(rows: int, device: str, vocabulary: int = 101) -> Tensor:
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_errs_at_most_twice_as_much_as_eager_code(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", dict.fromkeys(("cuda", "cpu"), 7 * 101))  # the last one is not full
    tensors, labels = student(38, dtype, device), targets(38, device)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = loss_and_gradients(label_cross_entropy(*tensors, labels=labels), tensors)
    theirs = loss_and_gradients(cross_entropy(linear(*tensors), labels, reduction="sum"), tensors)
    true = loss_and_gradients(cross_entropy(linear(*exact), labels, reduction="sum"), exact)
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
    assert actual[0].item() == pytest.approx(true[0].item(), rel=1e-5)
    assert [g.dtype for g in actual[1:]] == [dtype] * 3
    for mine, eagers, expected in zip(actual, theirs, true, strict=True):
        assert_within_eager_error(mine, eagers, expected)


def test_it_is_the_mean_over_the_labelled_tokens(device: str) -> None:
    """BERT's: -log q of the word that was there. What is at tokens without labels, padding or not, changes nothing."""
    hidden, weight, bias = student(24, torch.float32, device)
    labels = targets(24, device).view(3, 8)
    labels[torch.rand(3, 8, generator=torch.Generator().manual_seed(2)).to(device) < 0.7] = -100
    labels[2] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    q = torch.softmax(linear(*exact), -1)
    rows = [(row, label) for row, label in enumerate(labels.flatten().tolist()) if label >= 0]
    assert 2 < len(rows) < 12
    expected = -sum(q[row, label].log() for row, label in rows) / len(rows)
    spoilt = torch.where(labels.flatten()[:, None] < 0, torch.nan, hidden.detach()).requires_grad_()
    output = TokenOutput(spoilt.view(3, 8, -1), weight, bias)
    loss, parts = MaskedLM(0.5)(NOTHING, NOTHING._replace(output=output), {"labels": labels})
    assert parts["mlm"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert not parts["mlm"].requires_grad
    gradients = torch.autograd.grad(loss, (spoilt, weight, bias))
    for mine, true in zip(gradients, torch.autograd.grad(0.5 * expected, exact), strict=True):
        assert (mine - true).norm() <= 1e-5 * true.norm()
    assert not gradients[0][labels.flatten() < 0].any()


def test_a_batch_without_labels_has_loss_0_and_a_graph(device: str) -> None:
    hidden, weight, bias = student(6, torch.float32, device)
    output = TokenOutput(hidden.view(2, 3, -1), weight, bias)
    labels = torch.full((2, 3), -100, device=device)
    loss, _ = MaskedLM()(NOTHING, NOTHING._replace(output=output), {"labels": labels})
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_no_logits_of_all_labelled_rows(device: str, tmp_path: Path) -> None:
    """BERT's vocabulary and a small width, so that beside the gradient of the weight only logits count."""
    vocabulary = 30522
    rows = 16 * chunks.CHUNK_ELEMENTS[device] // vocabulary
    tensors, labels = student(rows, torch.float32, device, vocabulary), targets(rows, device, vocabulary)

    def eager() -> list[Tensor]:
        return loss_and_gradients(cross_entropy(linear(*tensors), labels, reduction="sum"), tensors)

    def chunked() -> list[Tensor]:
        return loss_and_gradients(label_cross_entropy(*tensors, labels=labels), tensors)

    _, of_eager = largest_and_peak(eager, tmp_path / "eager.json")
    assert of_eager >= 2 * 4 * rows * vocabulary  # of the logits and their gradient
    assert largest_and_peak(chunked, tmp_path / "chunked.json")[1] < of_eager / 10


def test_what_cannot_be_is_one_sentence() -> None:
    hidden, weight, bias = student(6, torch.float32, "cpu")
    labels = torch.zeros(2, 4, dtype=torch.long)
    output = TokenOutput(hidden.view(2, 3, -1), weight, bias)
    with pytest.raises(ValueError, match=r"labels are \(2, 4\), \(batch, tokens\) is \(2, 3\)"):
        MaskedLM()(NOTHING, NOTHING._replace(output=output), {"labels": labels})
    with pytest.raises(ValueError, match="the student gives a ExampleOutput, and masked tokens need a TokenOutput"):
        MaskedLM()(NOTHING, NOTHING._replace(output=ExampleOutput(torch.zeros(2, 3))), {"labels": labels})
    with pytest.raises(ValueError, match="the batch has no labels"):
        MaskedLM()(NOTHING, NOTHING._replace(output=output), {})
