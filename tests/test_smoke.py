"""What the oldest and the newest versions of the dependencies must do: a loss, a capture, a run, a resume, two ranks.

Continuous integration runs this file in an environment of its own at each end, with the sdist and the wheel (.ci/run).
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import CommandLine
from one_step import one_step
from own_attention import own_attention_matches
from tiny_models import tiny_inputs, tiny_model
from transformers import AutoModel, TrainerCallback
from two_ranks import on_two_ranks

import minilm
import minilm_kernels
from minilm import DistillationTrainer, build_student, fused_minilm_loss
from minilm.cli.check import REFERENCE

RUN = [
    *("--student_num_layers", "2", "--student_hidden_size", "16", "--max_steps", "5", "--save_steps", "2"),
    *("--per_device_train_batch_size", "4", "--max_length", "12", "--disable_tqdm", "true", "--use_cpu"),
]


def test_every_implementation_gives_the_loss_and_the_gradients_of_the_formula(implementation: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(21) < torch.tensor([21, 13])[:, None]).to(device)

    def evaluate(implementation: str, dtype: torch.dtype) -> list[torch.Tensor]:
        teacher = [x.to(device, dtype) for x in tensors[:3]]
        student = [x.to(device, dtype).requires_grad_() for x in tensors[3:]]
        loss = fused_minilm_loss(
            (teacher[0], teacher[1], teacher[2]),
            (student[0], student[1], student[2]),
            ("qk", "vv"),
            attention_mask=mask,
            implementation=implementation,
        )
        loss.backward()
        return [loss.detach(), *(x.grad for x in student if x.grad is not None)]

    tensors = [torch.randn(2, 2, 21, dim, generator=generator) for dim in (8, 8, 8, 4, 4, 4)]
    exact = evaluate("reference", torch.float64)
    assert len(exact) == 4
    for actual, expected in zip(evaluate(implementation, torch.float32), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "llama", "vit"])
def test_captured_relations_are_the_models_own_and_its_student_loads_again(tmp_path: Path, family: str) -> None:
    teacher = tiny_model(family)
    inputs = tiny_inputs(teacher)
    assert own_attention_matches(teacher, inputs)
    student = build_student(teacher, num_layers=1, init="layers").eval()
    student.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], student(**inputs)[0])


def test_the_package_holds_what_it_reads(command: CommandLine) -> None:
    code, out, _ = command("--list_recipes")
    assert code == 0
    assert len(out.splitlines()) > 10
    assert json.loads(REFERENCE.read_text(encoding="utf-8"))["curves"]
    for package in (minilm, minilm_kernels):
        assert Path(package.__file__).with_name("py.typed").is_file()


class Steps(TrainerCallback):
    """Which steps have begun; the third ends in Ctrl-C."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.begun.append(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if self.begun == [1, 2, 3]:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_bitwise_as_one_that_was_not_stopped(
    command: CommandLine, teacher: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--teacher", teacher, "--data", data, *RUN]
    assert command(*run, "--output_dir", "whole")[0] == 0

    initialise, steps = DistillationTrainer.__init__, Steps()

    def watched(self: DistillationTrainer, **options: object) -> None:
        initialise(self, **options)  # type: ignore[arg-type]
        self.add_callback(steps)

    monkeypatch.setattr(DistillationTrainer, "__init__", watched)
    assert command(*run, "--output_dir", "stopped")[0] == 130
    assert not Path("stopped/model.safetensors").exists()
    assert command(*run, "--output_dir", "stopped", "--resume_from_checkpoint", "auto")[0] == 0
    assert steps.begun == [1, 2, 3, 3, 4, 5]  # a checkpoint every second step
    whole, resumed = (Path(folder, "model.safetensors").read_bytes() for folder in ("whole", "stopped"))
    assert whole == resumed


def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    """Twelve sequences, four of them empty, so that the micro-batches and the ranks hold different numbers."""
    on_two_ranks(one_step, tmp_path / "two", 2, 3)
    one_step(tmp_path / "one", 12, 1)
    one, two = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    logged = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
