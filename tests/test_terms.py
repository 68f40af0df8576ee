"""Terms and objectives: a term of one's own, with a parameter, does all that the shipped ones do; what is observed."""

import json
from pathlib import Path

import pytest
import torch
from one_step import LENGTHS, sequences, trainer
from own_term import HiddenMSE, objective, one_step
from sharded_step import one_step as other_step
from sharded_step import sharded_step
from test_trainer import StopAt, assert_close, weights
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor
from transformers import AutoModel, Trainer, TrainerState
from two_ranks import Step, whole_halves_and_ranks

from minilm import MiniLMLoss, attention_qkv, fused_minilm_loss
from minilm.models.observe import Needs, observe
from minilm.objectives.outputs import SoftLabels
from minilm.objectives.relations import Relations
from minilm.objectives.term import Objective
from minilm.training.overrides import OVERRIDDEN
from minilm.training.progress import DistillationProgress
from minilm.training.saving import OBJECTIVE
from minilm.training.trainer import DistillationTrainer

SMALL_BATCH = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 7}


def state(run: DistillationTrainer) -> dict[str, Tensor]:
    return weights(run.student) | {f"terms.{name}": x.clone() for name, x in run.terms.state_dict().items()}


def expected_of_tokens(run: DistillationTrainer) -> float:
    """The own term's mean over all tokens, from each sequence alone and from transformers' hidden states."""
    total = torch.zeros(())
    for row in sequences():
        inputs = {"input_ids": torch.tensor([row["input_ids"]]), "output_hidden_states": True}
        with torch.no_grad():
            theirs, mine = (model.eval()(**inputs).hidden_states for model in (run.teacher, run.student))
            projected = run.terms[1].projection(mine[1])
        total += (projected - theirs[2]).square().mean(-1).sum()
    return total.item() / sum(LENGTHS)


def test_a_term_of_ones_own_is_trained_logged_and_evaluated(tmp_path: Path) -> None:
    run = trainer(tmp_path, criterion=objective(), own={"eval_dataset": sequences(empty=1)}, **SMALL_BATCH)
    before = state(run)
    expected = expected_of_tokens(run)
    metrics = run.evaluate()
    assert metrics["eval_hidden_1"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_qk"] + metrics["eval_vv"] + 0.5 * metrics["eval_hidden_1"], rel=1e-6
    )
    run.train()
    assert not torch.equal(state(run)["terms.1.projection.weight"], before["terms.1.projection.weight"])
    logged = next(row for row in run.state.log_history if "loss" in row)
    assert logged["loss"] == pytest.approx(logged["qk"] + logged["vv"] + 0.5 * logged["hidden_1"], rel=1e-5)


def test_a_terms_parameters_are_resumed_and_stay_out_of_the_students_folder(tmp_path: Path) -> None:
    options = ADAM | SMALL_BATCH
    whole = trainer(tmp_path / "whole", criterion=objective(), **options)
    whole.train()
    stopped = trainer(tmp_path / "stopped", criterion=objective(), own={"callbacks": [StopAt(4)]}, **options)
    stopped.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-4"
    resumed = trainer(tmp_path / "stopped", criterion=objective(), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_close(state(resumed), state(whole))
    assert not torch.equal(state(stopped)["terms.1.projection.weight"], state(whole)["terms.1.projection.weight"])
    resumed.save_student()
    assert {file.name for file in (tmp_path / "stopped").iterdir() if file.is_file()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", ".minilm.json")
    }
    assert AutoModel.from_pretrained(tmp_path / "stopped").state_dict().keys() == weights(resumed.student).keys()
    assert "projection" not in "".join(AutoModel.from_pretrained(checkpoint).state_dict())


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, criterion=objective(), own={"callbacks": [StopAt(1)]}, max_steps=2)
    run.train()
    assert (tmp_path / "checkpoint-1" / OBJECTIVE).exists()
    other = trainer(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"of an objective with parameters \{'1.projection.weight': .*, this one has"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(("steps", "on_ranks"), [(one_step, one_step), (other_step, sharded_step)])
def test_one_micro_batch_several_and_two_ranks_take_the_same_step(tmp_path: Path, steps: Step, on_ranks: Step) -> None:
    """Whether a rank holds all or a shard. The former then resume from their own checkpoint: bitwise what they were."""
    folders = whole_halves_and_ranks(steps, tmp_path, on_ranks)
    first, *others = [
        AutoModel.from_pretrained(folder).state_dict() | torch.load(folder / "checkpoint-1" / OBJECTIVE)
        for folder in folders
    ]
    logged = [json.loads((folder / "log.json").read_text()) for folder in folders]
    for other, log in zip(others, logged[1:], strict=True):
        assert_close(other, first, rtol=1e-5, atol=1e-6)
        assert log == pytest.approx(logged[0], rel=1e-5)


def test_the_bar_shows_the_parts_and_an_evaluation_a_line() -> None:
    class Bar:
        shown: list[str] = []  # noqa: RUF012
        set_postfix_str = write = shown.append

    bar = DistillationProgress(["hidden_1"])
    bar.training_bar = Bar
    state = TrainerState(global_step=3)
    logs = {"loss": 1.5, "grad_norm": 2.0, "hidden_1": 3.0, "tokens_per_second": 1234.0, "epoch": 1}
    bar.on_log(None, state, None, logs)
    bar.on_log(None, state, None, {"eval_loss": 0.5, "eval_hidden_1": 1.0, "eval_runtime": 1.0})
    assert Bar.shown == [
        "loss 1.5000, hidden_1 3.0000, 1,234 tokens/s",
        "step 3: held-out loss 0.5000, hidden_1 1.0000",
    ]


def test_relations_of_several_layers_are_summed_and_named_by_the_students(tmp_path: Path) -> None:
    relations = Relations(MiniLMLoss({"qk": 0.5}), {1: 2, -1: 4})
    run = trainer(tmp_path, criterion=Objective([relations]), own={"eval_dataset": sequences()})
    assert run.parts == ["qk_1", "qk_-1"]
    metrics = run.evaluate()
    for name, mine, theirs in (("qk_1", 1, 2), ("qk_-1", 2, 4)):
        losses = []
        for row in sequences():
            inputs = {"input_ids": torch.tensor([row["input_ids"]])}
            pair = attention_qkv(run.teacher, inputs, theirs), attention_qkv(run.student.eval(), inputs, mine)
            losses.append(fused_minilm_loss(*pair, relations=["qk"], implementation="reference"))
        assert metrics[f"eval_{name}"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(0.5 * (metrics["eval_qk_1"] + metrics["eval_qk_-1"]), rel=1e-6)
    run.train()
    logged = next(row for row in run.state.log_history if "loss" in row)
    assert logged["loss"] == pytest.approx(0.5 * (logged["qk_1"] + logged["qk_-1"]), rel=1e-5)


def test_objectives_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one term, it has 0"):
        Objective([])
    with pytest.raises(ValueError, match="two parts of the objective are named 'output'"):
        Objective([SoftLabels("tokens"), SoftLabels("examples")])
    with pytest.raises(ValueError, match=r"an Objective, whose terms say what teacher_layer=2, .* leave these out"):
        trainer(tmp_path, criterion=objective(), own={"teacher_layer": 2})
    with pytest.raises(ValueError, match="layer 9 does not exist: layers are 1 to 4"):
        trainer(tmp_path, criterion=Objective([Relations(MiniLMLoss(), {-1: 9})]))


def test_what_the_objective_does_not_reach_is_frozen(tmp_path: Path) -> None:
    """The own term ends at the first of two layers."""
    run = trainer(tmp_path, criterion=Objective([HiddenMSE()]))
    trained = {name for name, parameter in run.student.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in run.student.named_parameters() if name.startswith(("embeddings.", "encoder.layer.0."))
    }


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "gpt2", "distilbert", "vit"])
def test_hidden_states_are_what_layers_hand_on(family: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    ran: list[None] = []
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        model.register_forward_hook(lambda *_: ran.append(None))
        observed = observe(model, inputs, Needs(qkv=(2, -2), hidden=(0, 1, -2)))
        assert not ran  # it ended before
        for layer, name in ((0, 0), (1, 1), (3, -2)):
            assert torch.equal(observed.hidden[name], expected[layer])
        for layer in (2, -2):
            alone = attention_qkv(model, inputs, layer)
            assert all(torch.equal(a, b) for a, b in zip(observed.qkv[layer], alone, strict=True))
        last = observe(model, inputs, Needs(qkv=(-1,), hidden=(2,)))
        assert torch.equal(last.hidden[2], expected[2])
        assert torch.equal(last.qkv[-1][0], attention_qkv(model, inputs)[0])
    assert not ran


def test_hidden_states_and_the_heads_output_come_from_one_forward() -> None:
    model = tiny_model("bert", "ForMaskedLM")
    inputs = tiny_inputs(model)
    ran: list[None] = []
    model.bert.embeddings.register_forward_hook(lambda *_: ran.append(None))
    with torch.no_grad():
        observed = observe(model, inputs, Needs(qkv=(1,), hidden=(4,), output=True))
        assert len(ran) == 1
        whole = model(**inputs, output_hidden_states=True)
    hidden, weight, bias = observed.output
    assert torch.equal(torch.nn.functional.linear(hidden, weight, bias), whole.logits)
    assert torch.equal(observed.hidden[4], whole.hidden_states[4])


def test_nothing_is_run_for_nothing() -> None:
    model = tiny_model("bert")
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    assert observe(model, tiny_inputs(model), Needs()).output is None


def test_the_list_of_overridden_private_methods_is_whole() -> None:
    overridden = {}
    for kind in DistillationTrainer.__mro__[: DistillationTrainer.__mro__.index(Trainer)]:
        names = {name for name in vars(kind) if name.startswith("_") and not name.startswith("__")}
        overridden[kind.__name__] = sorted(name for name in names if callable(getattr(Trainer, name, None)))
    assert {name: methods for name, methods in overridden.items() if methods} == OVERRIDDEN
