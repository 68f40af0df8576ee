"""Relations of several layers in one call: the same numbers as layer by layer, fewer launches, linear memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import Case, Triple, build
from test_loss_memory import memory

from minilm import MiniLMLoss
from minilm_kernels import _autograd

RELATIONS = {"qk": 1.0, "vv": 0.5}


def layers(device: str, n: int = 13, count: int = 3) -> tuple[list[Triple], list[Triple], dict[str, Any]]:
    """Teacher and student of `count` layers, and one mask for all."""
    pairs = [build(Case(id=f"layer {i}", n=n, batch=2, masks=("right", "holes")), device) for i in range(count)]
    teacher, student = [pair.teacher for pair in pairs], [pair.student for pair in pairs]
    return teacher, student, {"attention_mask": pairs[0].options["attention_mask"]}


def gradients(loss: torch.Tensor, student: list[Triple]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, [x for triple in student for x in triple])


def test_each_layer_is_bitwise_what_it_is_alone(implementation: str, device: str) -> None:
    """The sum alone is added up in another order."""
    teacher, student, mask = layers(device)
    for triple in student:
        for x in triple:
            x.requires_grad_()
    criterion = MiniLMLoss(RELATIONS, implementation=implementation)
    total, losses = criterion.of_layers(teacher, student, **mask)
    alone = [criterion(*pair, **mask) for pair in zip(teacher, student, strict=True)]
    assert losses == [parts for _, parts in alone]
    single = torch.stack([loss for loss, _ in alone]).sum()
    torch.testing.assert_close(total, single, rtol=1e-6, atol=0)
    for together, by_layer in zip(gradients(total, student), gradients(single, student), strict=True):
        assert torch.equal(together, by_layer)


def test_layers_of_one_shape_share_their_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    forward = _autograd._ops.forward
    monkeypatch.setattr(_autograd._ops, "forward", lambda *args: (launches.append(0), forward(*args))[1])
    criterion = MiniLMLoss(RELATIONS, implementation="chunked")
    teacher, student, mask = layers(device)
    criterion.of_layers(teacher, student, **mask)
    assert len(launches) == 2  # of the attention relations, and of the value relations
    other, _, _ = layers(device, count=1)
    q, k, v = other[0]
    narrow = q[..., :4], k[..., :4], v[..., :4]
    criterion.of_layers([*teacher, narrow], [*student, narrow], **mask)
    assert len(launches) == 2 + 4


def test_layers_that_do_not_fit_are_refused(device: str) -> None:
    teacher, student, mask = layers(device)
    with pytest.raises(ValueError, match="has 13 tokens, teacher's q has 5"):
        MiniLMLoss(["qq"]).of_layers([teacher[0], (teacher[1][0][:, :, :5], None, None)], student[:2], **mask)


def test_layer_to_layer_stays_under_a_tenth_of_eagers_memory(device: str, tmp_path: Path) -> None:
    """Of two layers at once: eager code keeps the scores of all for the backward."""
    pairs = [build(Case(id=f"long {i}", n=4096, teacher=(1, 1, 8), student=(1, 1, 8)), device) for i in range(2)]

    def run(implementation: str) -> None:
        student = [tuple(x.detach().requires_grad_() for x in pair.student) for pair in pairs]
        criterion = MiniLMLoss(["qk"], implementation=implementation)
        total, _ = criterion.of_layers([pair.teacher for pair in pairs], student)
        total.backward()

    fused = "triton" if device == "cuda" else "chunked"
    eager = memory(lambda: run("reference"), tmp_path / "eager.json")
    assert eager.largest >= 4096 * 4096 * 4  # the measure sees a float32 matrix of scores
    assert memory(lambda: run(fused), tmp_path / "fused.json").peak < eager.peak / 10
