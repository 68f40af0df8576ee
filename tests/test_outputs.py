"""Distillation of the logits: the loss against eager code and its memory, and where in a model it is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import assert_within_eager_error
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from minilm import attention_qkv
from minilm.models.capture import QKV
from minilm.models.heads import ExampleOutput, Output, TokenOutput, check_output
from minilm.models.observe import Needs, observe
from minilm.objectives import chunks
from minilm.objectives.outputs import output_loss, soft_label_kl


def forward_with_output(model: Any, inputs: Any, layer: int = -1) -> tuple[QKV, Output]:
    observed = observe(model, inputs, Needs(qkv=(layer,), output=True))
    assert observed.output is not None
    return observed.qkv[layer], observed.output


VOCABULARY_HEADS = [
    ("bert", "ForMaskedLM"),
    ("roberta", "ForMaskedLM"),
    ("distilbert", "ForMaskedLM"),
    ("electra", "ForMaskedLM"),
    ("albert", "ForMaskedLM"),
    ("modernbert", "ForMaskedLM"),
    ("llama", "ForCausalLM"),
    ("qwen3", "ForCausalLM"),
    ("gpt2", "LMHeadModel"),
]
CLASSIFIERS = [("bert", "ForSequenceClassification"), ("vit", "ForImageClassification")]


def formula(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """L_OUT of logits as the papers write it, in their dtype."""
    log_p, log_q = (torch.log_softmax(z / temperature, dim=-1) for z in (z_t, z_s))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def heads(rows: int, vocabulary: int, dtype: torch.dtype, device: str, bias: bool = True) -> list[Tensor | None]:
    """The six tensors of `soft_label_kl`; the student's want gradients. Logits of a few units, as a trained model's."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors: list[Tensor | None] = []
    for width in (24, 40):
        hidden, weight = random(rows, width), random(vocabulary, width) * (4 / width) ** 0.5
        tensors += [hidden, weight, random(vocabulary) if bias else None]
    for tensor in tensors[:3]:
        if tensor is not None:
            tensor.requires_grad_()
    return tensors


def eager(tensors: list[Tensor | None], temperature: float) -> Tensor:
    hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t = tensors
    return formula(linear(hidden_s, weight_s, bias_s), linear(hidden_t, weight_t, bias_t), temperature)


def loss_and_gradients(loss: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    student = [tensor for tensor in tensors[:3] if tensor is not None]
    return [loss.detach(), *torch.autograd.grad(3 * loss, student)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7 rows of 101 words: the last one is not full."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", {"cuda": 7 * 101, "cpu": 7 * 101})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_errs_at_most_twice_as_much_as_eager_code(
    dtype: torch.dtype, temperature: float, bias: bool, device: str
) -> None:
    tensors = heads(38, 101, dtype, device, bias)
    exact = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    actual = loss_and_gradients(soft_label_kl(*tensors, temperature=temperature), tensors)
    theirs = loss_and_gradients(eager(tensors, temperature), tensors)
    true = loss_and_gradients(eager(exact, temperature), exact)
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
    assert actual[0].item() == pytest.approx(true[0].item(), rel=1e-5)  # float32 sums, whatever comes in
    assert [g.dtype for g in actual[1:]] == [dtype] * (2 + bias)
    for mine, eagers, expected in zip(actual, theirs, true, strict=True):
        assert_within_eager_error(mine, eagers, expected)


@pytest.mark.usefixtures("small_chunks")
def test_under_autocast_errs_at_most_twice_as_much_as_eager_code(device: str) -> None:
    tensors = heads(38, 101, torch.float32, device)
    exact = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    with torch.autocast(device, torch.bfloat16):
        loss = soft_label_kl(*tensors)
        theirs = eager(tensors, 1.0)
    assert loss.dtype == torch.float32
    # Of the product nothing but the inputs is rounded, and on a CPU not even those.
    inputs = torch.bfloat16 if device == "cuda" else torch.float32
    rounded = [x if x is None or x.ndim == 1 else x.to(inputs) for x in tensors]
    same = eager([None if x is None else x.detach().double() for x in rounded], 1.0)
    assert loss.item() == pytest.approx(same.item(), rel=1e-5)
    true = loss_and_gradients(eager(exact, 1.0), exact)
    for actual, eagers, expected in zip(
        loss_and_gradients(loss, tensors), loss_and_gradients(theirs, tensors), true, strict=True
    ):
        assert actual.dtype == torch.float32
        assert_within_eager_error(actual, eagers, expected)


@pytest.mark.usefixtures("small_chunks")
def test_models_of_different_dtypes(device: str) -> None:
    student, teacher = heads(38, 101, torch.float32, device)[:3], heads(38, 101, torch.bfloat16, device)[3:]
    exact = eager([x.detach().double() for x in student + teacher if x is not None], 1.0)
    loss = soft_label_kl(*student, *teacher)
    assert loss.double().item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool, device: str) -> None:
    student, teacher = heads(9, 101, torch.float64, device, bias), heads(9, 101, torch.float64, device)[3:]
    arguments = [x for x in student[:3] if x is not None]

    def loss(*inputs: Tensor) -> Tensor:
        return soft_label_kl(inputs[0], inputs[1], inputs[2] if bias else None, *teacher, temperature=1.7)

    assert torch.autograd.gradcheck(loss, arguments, fast_mode=True)


def test_gradients_are_only_those_asked_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = heads(9, 101, torch.float32, device)
    hidden, weight, bias, *teacher = tensors
    assert hidden is not None
    assert weight is not None
    for tensor in teacher:
        assert tensor is not None
        tensor.requires_grad_()
    frozen = weight.detach()
    soft_label_kl(hidden, frozen, bias, *teacher).backward()
    assert hidden.grad is not None
    assert all(tensor is not None and tensor.grad is None for tensor in (weight, *teacher))
    constants = [None if x is None else x.detach() for x in tensors[:3]]
    assert not soft_label_kl(*constants, *teacher).requires_grad
    monkeypatch.delattr(chunks, "_add_product")  # which makes the gradients
    with torch.no_grad():
        assert not soft_label_kl(*tensors).requires_grad


def test_backward_twice_and_second_derivatives(device: str) -> None:
    tensors = heads(9, 101, torch.float32, device)
    student = tensors[:3]
    loss = soft_label_kl(*tensors)
    first = torch.autograd.grad(loss, student, retain_graph=True)
    second = torch.autograd.grad(loss, student, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_equal_models_and_no_rows(device: str) -> None:
    hidden, weight, bias, *_ = heads(9, 101, torch.float32, device)
    student = hidden, weight, bias
    loss = soft_label_kl(*student, *student, 2.0)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, student))
    nothing = soft_label_kl(hidden[:0], weight, bias, hidden[:0], weight, bias)
    assert nothing.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(nothing, student))


def largest_and_peak(run: Any, trace: Path) -> tuple[int, int]:
    """Bytes of the largest allocation, and the most held above what was held before."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        kept = run()
    del kept
    profiler.export_chrome_trace(str(trace))
    events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events = [e for e in events if e["Device Type"] == int(torch.cuda.is_available())]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(e["Bytes"] for e in events), max(e["Total Allocated"] for e in events) - before


def test_no_logits_of_all_rows(device: str, tmp_path: Path) -> None:
    """BERT's vocabulary and a small width, so that beside 2.9 MB of gradient of a weight only logits count."""
    vocabulary = 30522
    chunk = 4 * chunks.CHUNK_ELEMENTS[device]
    rows = 8 * chunks.CHUNK_ELEMENTS[device] // vocabulary
    tensors = heads(rows, vocabulary, torch.float32, device)
    logits = rows * vocabulary * 4

    def step(loss: Any) -> list[Tensor]:
        return loss_and_gradients(loss(), tensors)

    assert largest_and_peak(lambda: step(lambda: eager(tensors, 1.0)), tmp_path / "eager.json")[0] >= logits
    largest, peak = largest_and_peak(lambda: step(lambda: soft_label_kl(*tensors)), tmp_path / "chunked.json")
    assert largest <= chunk
    assert peak < 6 * chunk + 3 * vocabulary * 24 * 4


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({0: (8, 24)}, r"the teacher has 9 rows, the student 8"),
        ({0: (9, 25)}, r"the student's hidden states are 25 wide, its weight 24"),
        ({4: (101, 41)}, r"the teacher's hidden states are 40 wide, its weight 41"),
        ({4: (102, 40)}, r"the teacher's vocabulary is 102, the student's 101"),
        ({6: 0.0}, r"temperature is 0.0: it must be positive"),
        ({6: float("nan")}, r"temperature is nan: it must be positive"),
        ({6: 1e300}, r"temperature is 1e\+300: it must lie between 1e-18 and 1e\+18"),
        ({6: 1e-300}, r"temperature is 1e-300: it must lie between"),
        ({6: 10**400}, r"temperature is 10{400}: it must lie between"),
        ({6: float("inf")}, r"temperature is inf: it must lie between"),
    ],
)
def test_wrong_use(replaced: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [*heads(9, 101, torch.float32, "cpu"), 1.0]
    for index, value in replaced.items():
        arguments[index] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        soft_label_kl(*arguments)


@pytest.mark.parametrize("temperature", [True, "2", None, torch.tensor(2.0)])
def test_a_temperature_that_is_no_number(temperature: Any) -> None:
    kind = type(temperature).__name__
    with pytest.raises(TypeError, match=f"temperature must be a number, not a {kind}"):
        soft_label_kl(*heads(9, 101, torch.float32, "cpu"), temperature=temperature)
    with pytest.raises(TypeError, match=f"temperature must be a number, not a {kind}"):
        output_loss(ExampleOutput(torch.zeros(2, 3)), ExampleOutput(torch.zeros(2, 3)), temperature)


@pytest.mark.parametrize("temperature", [1e-18, 1e-6, 1e6, 1e18])
def test_the_temperatures_at_the_ends_are_finite(temperature: float) -> None:
    tensors = heads(9, 101, torch.float32, "cpu")
    assert all(
        x.isfinite().all() for x in loss_and_gradients(soft_label_kl(*tensors, temperature=temperature), tensors)
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own, of its forward-mode rules
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_raises(index: int, grad: bool) -> None:
    tensors = [None if x is None else x.detach() for x in heads(9, 101, torch.float32, "cpu")]

    x = tensors[index]
    assert x is not None
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        tensors[index] = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            soft_label_kl(*tensors)


@pytest.mark.parametrize(("family", "head"), VOCABULARY_HEADS)
def test_vocabulary_head_gives_what_makes_its_logits(family: str, head: str) -> None:
    model = tiny_model(family, head)
    inputs = tiny_inputs(model)
    check_output(model, inputs)
    layer = model.get_output_embeddings()
    ran: list[None] = []
    handle = layer.register_forward_hook(lambda *_: ran.append(None))
    with torch.no_grad():
        qkv, output = forward_with_output(model, inputs, 2)
        handle.remove()
        assert not ran  # no logits
        expected = model(**inputs).logits
        expected_qkv = attention_qkv(model, inputs, 2)
    assert isinstance(output, TokenOutput)
    assert torch.equal(linear(*output), expected)
    assert all(torch.equal(a, b) for a, b in zip(qkv, expected_qkv, strict=True))
    assert not layer._forward_pre_hooks


def test_mobileberts_head_is_put_together_of_its_two_parts() -> None:
    """Its output embeddings are 16 wide, what they are multiplied with is 32."""
    model = tiny_model("mobilebert", "ForMaskedLM")
    inputs = tiny_inputs(model)
    check_output(model, inputs)
    _, output = forward_with_output(model, inputs)
    trained = {name: x for name, x in model.named_parameters() if not name.startswith("mobilebert.pooler")}
    gradients = []
    for logits in (linear(*output), model(**inputs).logits):
        loss = torch.log_softmax(logits, -1)[..., 7].sum()
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(trained.values()))])
    assert "cls.predictions.dense.weight" in trained
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "head"), CLASSIFIERS)
def test_classifier_gives_its_logits(family: str, head: str) -> None:
    model = tiny_model(family, head, num_labels=3)
    inputs = tiny_inputs(model)
    check_output(model, inputs)
    with torch.no_grad():
        qkv, output = forward_with_output(model, inputs)
        expected_qkv = attention_qkv(model, inputs)
        assert isinstance(output, ExampleOutput)
        assert torch.equal(output.logits, model(**inputs).logits)
    assert output.logits.shape == (2, 3)
    assert all(torch.equal(a, b) for a, b in zip(qkv, expected_qkv, strict=True))


@pytest.mark.parametrize(
    ("family", "head", "config", "message"),
    [
        ("bert", "Model", {}, "BertModel has no head to distil: its output embeddings are nothing"),
        ("electra", "ForPreTraining", {}, "ElectraForPreTraining has no head to distil"),
        ("bert", "ForTokenClassification", {}, "BertForTokenClassification has no head to distil"),
        ("gemma2", "ForCausalLM", {}, "Gemma2ForCausalLM does not return what its output layer computes"),
        ("bert", "ForSequenceClassification", {"num_labels": 1}, "with 1 labels .* no softmax to distil"),
        (
            "bert",
            "ForSequenceClassification",
            {"problem_type": "multi_label_classification"},
            "problem_type 'multi_label_classification' does not choose one",
        ),
    ],
)
def test_models_without_a_head_to_distil(family: str, head: str, config: dict[str, Any], message: str) -> None:
    model = tiny_model(family, head, **config)
    with pytest.raises(ValueError, match=message):
        check_output(model, tiny_inputs(model))


def test_a_head_that_is_not_called() -> None:
    class Bypassing(type(tiny_model("bert", "ForMaskedLM"))):
        def forward(self, **inputs: Tensor) -> Any:
            return self.bert(**inputs)

    model = tiny_model("bert", "ForMaskedLM")
    model.__class__ = Bypassing
    with pytest.raises(ValueError, match="Bypassing computes its logits without calling its output layer"):
        forward_with_output(model, tiny_inputs(model))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_output_loss_is_the_sum_over_real_tokens(temperature: float) -> None:
    teacher, student = (tiny_model("bert", "ForMaskedLM", seed=seed) for seed in (0, 1))
    inputs = tiny_inputs(teacher, (11, 6))
    mask = inputs["attention_mask"]
    with torch.no_grad():
        theirs = forward_with_output(teacher, inputs)[1]
        z_t, z_s = (model(**inputs).logits[mask.bool()].double() for model in (teacher, student))
    mine = forward_with_output(student, inputs)[1]
    total, count = output_loss(mine, theirs, temperature, mask)
    assert count.item() == 17
    assert total.item() == pytest.approx(formula(z_s, z_t, temperature).item(), rel=1e-5)
    assert output_loss(mine, theirs)[1].item() == 22
    # Whatever stands behind the mask changes nothing.
    hidden = torch.where(mask.bool()[..., None], mine.hidden, torch.nan)
    spoilt = output_loss(mine._replace(hidden=hidden), theirs, temperature, mask)[0]  # type: ignore[call-arg]
    assert torch.equal(spoilt, total)


def test_output_loss_of_classifiers_is_the_sum_over_examples() -> None:
    teacher, student = (tiny_model("bert", "ForSequenceClassification", seed=seed, num_labels=3) for seed in (0, 1))
    inputs = tiny_inputs(teacher, (11, 6, 4))
    outputs_t, outputs_s = (forward_with_output(model, inputs)[1] for model in (teacher, student))
    total, count = output_loss(outputs_s, outputs_t, 2.0, inputs["attention_mask"])
    assert count.item() == 3
    assert isinstance(outputs_s, ExampleOutput)
    assert isinstance(outputs_t, ExampleOutput)
    expected = formula(outputs_s.logits.double(), outputs_t.logits.double(), 2.0)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.classifier.parameters())


TOKENS = TokenOutput(torch.zeros(2, 5, 4), torch.zeros(7, 4), None)


@pytest.mark.parametrize(
    ("student", "mask", "message"),
    [
        (ExampleOutput(torch.zeros(2, 3)), None, "teacher gives a TokenOutput and the student a ExampleOutput"),
        (TOKENS._replace(hidden=torch.zeros(2, 6, 4)), None, r"\(2, 5\), the student's for \(2, 6\)"),
        (TOKENS, torch.ones(2, 4), r"attention_mask is \(2, 4\), \(batch, tokens\) is \(2, 5\)"),
    ],
)
def test_outputs_that_do_not_match(student: Any, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_loss(student, TOKENS, attention_mask=mask)


def test_classifiers_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"classes\) \(2, 4\), the student's \(2, 3\)"):
        output_loss(ExampleOutput(torch.zeros(2, 3)), ExampleOutput(torch.zeros(2, 4)))


class Distilled(nn.Module):
    """The student inside a wrapper, as a trainer runs it: relations stood for by q, and the output loss."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student

    def forward(self, teacher: TokenOutput, **inputs: Tensor) -> Tensor:
        (q, _, _), output = forward_with_output(self.student, inputs)
        total, count = output_loss(output, teacher, 1.0, inputs["attention_mask"])
        return total / count + q.square().mean()


def student_and_teacher(family: str = "bert", head: str = "ForMaskedLM") -> tuple[Distilled, Any, dict[str, Tensor]]:
    student, teacher = (tiny_model(family, head, seed=seed) for seed in (1, 0))
    inputs = tiny_inputs(teacher)
    with torch.no_grad():
        return Distilled(student), forward_with_output(teacher, inputs)[1], inputs


def eager_gradients(family: str, head: str) -> dict[str, Tensor]:
    """Of the same loss, from the model's whole logits."""
    wrapper, teacher, inputs = student_and_teacher(family, head)
    mask = inputs["attention_mask"].bool()
    z_s = wrapper.student(**inputs).logits[mask]
    loss = (
        formula(z_s, linear(*teacher)[mask], 1.0) / mask.sum()
        + attention_qkv(wrapper.student, inputs)[0].square().mean()
    )
    loss.backward()
    return {name: p.grad for name, p in wrapper.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() >= expected.keys()
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        mine = actual[name]
        assert mine is not None, name
        assert (mine - gradient).norm().item() <= tolerance * (gradient.norm().item() + 1e-2 * largest), name


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "ForMaskedLM"), ("llama", "ForCausalLM"), ("gpt2", "LMHeadModel")]
)
def test_gradients_of_the_whole_model(family: str, head: str) -> None:
    """BERT's and GPT-2's embeddings are tied to the output layer and get the gradients of both uses."""
    wrapper, teacher, inputs = student_and_teacher(family, head)
    wrapper(teacher, **inputs).backward()
    tied = wrapper.student.get_output_embeddings().weight is wrapper.student.get_input_embeddings().weight
    assert tied == (family != "llama")
    assert_same_gradients({n: p.grad for n, p in wrapper.named_parameters()}, eager_gradients(family, head), 1e-4)


def test_gradient_checkpointing() -> None:
    wrapper, teacher, inputs = student_and_teacher()
    student = wrapper.student.train()
    runs: list[None] = []  # of the layer's inside: its own hooks stay outside of the checkpoint
    student.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: runs.append(None))

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)  # dropout
        return list(torch.autograd.grad(wrapper(teacher, **inputs), list(student.parameters()), allow_unused=True))

    plain = gradients()
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    runs.clear()
    checkpointed = gradients()
    assert len(runs) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_under_autocast() -> None:
    wrapper, teacher, inputs = student_and_teacher()
    with torch.autocast("cpu", torch.bfloat16):
        loss = wrapper(teacher, **inputs)
    assert loss.dtype == torch.float32
    loss.backward()
    assert_same_gradients(
        {n: p.grad for n, p in wrapper.named_parameters()}, eager_gradients("bert", "ForMaskedLM"), 0.1
    )


@pytest.mark.usefixtures("process_group")
def test_inside_ddp() -> None:
    wrapper, teacher, inputs = student_and_teacher()
    ddp = nn.parallel.DistributedDataParallel(wrapper)
    for _ in range(2):  # the second forward raises if a parameter got no gradient in the first
        ddp.zero_grad()
        ddp(teacher, **inputs).backward()
    assert_same_gradients(
        {n: p.grad for n, p in wrapper.named_parameters()}, eager_gradients("bert", "ForMaskedLM"), 1e-4
    )


@pytest.mark.usefixtures("process_group")
def test_inside_fsdp() -> None:
    from torch.distributed.fsdp import fully_shard

    wrapper, teacher, inputs = student_and_teacher()
    for layer in wrapper.student.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(wrapper)
    wrapper(teacher, **inputs).backward()
    gradients = {
        n: p.grad.full_tensor()  # type: ignore[attr-defined]
        for n, p in wrapper.named_parameters()
        if p.grad is not None
    }
    assert_same_gradients(gradients, eager_gradients("bert", "ForMaskedLM"), 1e-4)
