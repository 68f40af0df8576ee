"""Capture against forward hooks on the models' own projections, and every trap of switching a model's attention."""

import copy
import gc
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from own_attention import own_attention_matches
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, CLIPConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minilm import fused_minilm_loss
from minilm.models.capture import QKV, attention_qkv, capture
from minilm.models.layers import num_layers, resolve_layer
from minilm.models.observe import Needs, observe
from minilm.models.students import freeze_unused

# The modules whose outputs become q, k and v, and whether rotary position follows.
PROJECTIONS = {
    "bert": (("query", "key", "value"), False),
    "roberta": (("query", "key", "value"), False),
    "distilbert": (("q_lin", "k_lin", "v_lin"), False),
    "albert": (("query", "key", "value"), False),
    "vit": (("q_proj", "k_proj", "v_proj"), False),
    "gpt2": (("c_attn",), False),
    "modernbert": (("Wqkv",), True),
    "llama": (("q_proj", "k_proj", "v_proj"), True),
    "qwen3": (("q_norm", "k_norm", "v_proj"), True),
}
EAGER_AND_SDPA = [
    *((family, implementation) for family in PROJECTIONS for implementation in ("sdpa", "eager")),
    ("gemma2", "eager"),  # softcap comes as an argument that only some attention functions take
    ("t5", "sdpa"),  # position bias likewise
]


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position of (B, H, N, D) by complex numbers: entry i pairs with i + D/2 and turns by n·θ^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def own_projections(model: PreTrainedModel, family: str, inputs: dict[str, Tensor]) -> list[QKV]:
    """q, k, v of all layers, put together from what the projections of the model put out."""
    names, rotary = PROJECTIONS[family]
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for path, module in model.named_modules():
        if (name := path.split(".")[-1]) in names:
            keep = partial(lambda calls, *call: calls.append(call[-1]), outputs[name])
            hooks.append(module.register_forward_hook(keep))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    layers = []
    for layer, parts in enumerate(zip(*outputs.values(), strict=True)):
        if len(parts) == 1:
            parts = parts[0].chunk(3, -1)
        head_dim = getattr(model.config, "head_dim", None) or 32 // 4
        batch, tokens = parts[0].shape[:2]
        q, k, v = (part.reshape(batch, tokens, -1, head_dim).transpose(1, 2) for part in parts)
        if rotary:
            rope = model.config.rope_parameters
            kind = model.config.layer_types[layer] if family == "modernbert" else None
            theta = rope.get(kind, rope)["rope_theta"]  # sliding and full attention turn at different speeds
            q, k = rotate(q, theta), rotate(k, theta)
        layers.append((q, k, v))
    return layers


def enable_checkpointing(model: PreTrainedModel, **options: bool) -> None:
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)  # the newer name
    (enable or model.gradient_checkpointing_enable)(options)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_capture_equals_the_models_own_projections(family: str) -> None:
    model = tiny_model(family)
    assert model.config._attn_implementation == "sdpa"
    inputs = tiny_inputs(model)
    with capture(model, (1, 2, 3, -1)) as captured:
        model(**inputs)
    expected = own_projections(model, family, inputs)
    for layer, own in zip(captured, expected, strict=True):
        for tensor, exact in zip(captured[layer], own, strict=True):
            torch.testing.assert_close(tensor, exact, rtol=1e-5, atol=1e-5)
        for tensor, full in zip(attention_qkv(model, inputs, layer), captured[layer], strict=True):
            assert torch.equal(tensor, full)  # stopping there changes nothing below


@pytest.mark.parametrize(("family", "implementation"), EAGER_AND_SDPA)
def test_outputs_are_bitwise_unchanged(family: str, implementation: str) -> None:
    head = "EncoderModel" if family == "t5" else "Model"
    model = tiny_model(family, head, attn_implementation=implementation)
    inputs = tiny_inputs(model)
    before = model(**inputs)[0]
    with capture(model, [1, -2]):
        during = model(**inputs)[0]
    assert torch.equal(before, during)
    assert model.config._attn_implementation == implementation
    assert torch.equal(before, model(**inputs)[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_padding_is_masked_as_ever(family: str, implementation: str) -> None:
    model = tiny_model(family, attn_implementation=implementation)
    inputs = tiny_inputs(model, lengths=(11, 6))
    padded = attention_qkv(model, inputs)
    alone = attention_qkv(model, {name: tensor[1:, :6] for name, tensor in inputs.items()})
    for tensor, exact in zip(padded, alone, strict=True):
        torch.testing.assert_close(tensor[1:, :, :6], exact, rtol=1e-5, atol=1e-5)


def test_head_model() -> None:
    model = tiny_model("bert", "ForMaskedLM")
    inputs = tiny_inputs(model)
    with capture(model, [2]) as captured:
        logits = model(**inputs).logits
    assert logits.shape == (2, 11, 60)
    for tensor, exact in zip(captured[2], attention_qkv(model.base_model, inputs, 2), strict=True):
        assert torch.equal(tensor, exact)


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "vit"])
def test_stop_runs_nothing_above_the_projections(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    ran: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    cores = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: (cores.append(1), sdpa(*a, **k))[1]
    )
    inputs = tiny_inputs(model)
    model(**inputs)
    everything, all_cores = list(ran), len(cores)
    ran.clear(), cores.clear()
    after = "not reached"
    with capture(model, [1, 3], stop=True) as captured:
        model(**inputs)
        after = "reached"
    assert (sorted(captured), after) == ([1, 3], "not reached")
    assert (len(cores), all_cores) == (2, 4)  # layers 1 and 2 are whole
    names = PROJECTIONS[family][0]
    third = [i for i, path in enumerate(everything) if ".2." in path and path.split(".")[-1] in names]
    assert ran == everything[: third[-1] + 1]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_are_those_through_the_models_own_projections(family: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(model)

    def gradients(qkv: QKV) -> list[Tensor | None]:
        loss = torch.stack([tensor.square().sum() for tensor in qkv]).sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    expected = gradients(own_projections(model, family, inputs)[-1])
    assert sum(gradient is not None for gradient in expected) > 20
    with capture(model) as captured:
        model(**inputs)
    for qkv in (captured[-1], attention_qkv(model, inputs)):
        for gradient, exact in zip(gradients(qkv), expected, strict=True):
            assert (gradient is None) == (exact is None)
            if exact is not None:
                torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_views_where_the_model_makes_views_and_no_cache() -> None:
    for family in ("bert", "qwen3"):
        model = tiny_model(family)
        _, _, value = attention_qkv(model, tiny_inputs(model))
        assert value._base is not None, family  # a filled cache would have returned a copy
        assert value.stride(-1) == 1


def test_autocast_reaches_the_captured_tensors() -> None:
    model = tiny_model("bert")
    with torch.autocast("cpu", torch.bfloat16):
        assert {tensor.dtype for tensor in attention_qkv(model, tiny_inputs(model))} == {torch.bfloat16}


def test_what_is_saved_or_copied_inside_names_no_capture(tmp_path: Any) -> None:
    model = tiny_model("bert")
    inputs = tiny_inputs(model)
    with capture(model):
        model(**inputs)
        model.save_pretrained(tmp_path / "inside")
        twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "after")
    for folder in ("inside", "after"):
        assert "minilm" not in (tmp_path / folder / "config.json").read_text()
    assert torch.equal(twin(**inputs)[0], model(**inputs)[0])
    for tensor, exact in zip(attention_qkv(twin, inputs), attention_qkv(model, inputs), strict=True):
        assert torch.equal(tensor, exact)
    assert twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shared_config", [True, False])
def test_two_models_at_once(shared_config: bool) -> None:
    teacher, other = tiny_model("bert"), tiny_model("bert", seed=1)
    student = type(teacher)(teacher.config).eval() if shared_config else other
    inputs = tiny_inputs(teacher)
    with capture(teacher, [3]) as of_teacher:
        with capture(student, [3], stop=True) as of_student:
            teacher(**inputs)
            student(**inputs)
        assert teacher.config._attn_implementation != "sdpa"
        with capture(teacher, [2], stop=True) as again:
            teacher(**inputs)
    assert teacher.config._attn_implementation == student.config._attn_implementation == "sdpa"
    for model, captured, layer in ((teacher, of_teacher, 3), (student, of_student, 3), (teacher, again, 2)):
        for tensor, exact in zip(captured[layer], attention_qkv(model, inputs, layer), strict=True):
            assert torch.equal(tensor, exact)


def test_the_outer_capture_may_stop_first() -> None:
    model = tiny_model("bert")
    inputs = tiny_inputs(model)
    with capture(model, [2], stop=True) as outer:
        with capture(model, [1]) as inner:
            model(**inputs)
        raise AssertionError("the stop belongs to the outer block and leaves both")
    assert (list(outer), list(inner)) == ([2], [1])


@pytest.mark.parametrize("same_model", [True, False])
def test_threads(same_model: bool) -> None:
    """Another thread captures forwards before and after this one's, inside its block: neither disturbs the other."""
    first = tiny_model("bert")
    models = [first, first if same_model else tiny_model("bert", seed=1)]
    inputs = [tiny_inputs(first, seed=seed) for seed in (0, 1)]
    exact = [attention_qkv(model, given) for model, given in zip(models, inputs, strict=True)]
    turn = threading.Barrier(2, timeout=60)
    results: dict[int, QKV] = {}

    def one() -> None:
        with capture(models[0]) as captured:
            turn.wait()
            turn.wait()  # the other has captured and left
            models[0](**inputs[0])
            turn.wait()
            turn.wait()  # and once more
        results[0] = captured[-1]

    def other() -> None:
        for _ in range(2):
            turn.wait()
            results[1] = attention_qkv(models[1], inputs[1])
            turn.wait()

    threads = [threading.Thread(target=target) for target in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        for tensor, expected in zip(results[index], exact[index], strict=True):
            torch.testing.assert_close(tensor, expected)
    assert first.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("family", ["bert", "vit", "modernbert", "llama"])
def test_checkpointing(family: str, stop: bool, early_stop: bool) -> None:
    """Backward inside the block runs the layers again, which must neither be recorded nor counted."""
    model = tiny_model(family).train()
    inputs = {**tiny_inputs(model), **({"use_cache": False} if family == "llama" else {})}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with capture(model, [2, -1], stop=stop) as captured:
            model(**inputs)
        kept = {layer: list(qkv) for layer, qkv in captured.items()}
        with capture(model, [2, -1]) as untouched:
            sum(tensor.square().mean() for qkv in captured.values() for tensor in qkv).backward()
            assert untouched == {}
            model(**inputs)
        assert all(now is then for layer in kept for now, then in zip(captured[layer], kept[layer], strict=True))
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain_gradients = gradients()
    enable_checkpointing(model, use_reentrant=False, early_stop=early_stop)
    checkpointed = gradients()
    assert len(plain_gradients) == len(checkpointed) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, checkpointed, strict=True))


def test_checkpointing_holds_fewer_activations() -> None:
    """The test above would pass if checkpointing were never active."""
    model = tiny_model("bert").train()
    inputs = tiny_inputs(model)

    def saved() -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention_qkv(model, inputs)
        return count

    before = saved()
    enable_checkpointing(model, use_reentrant=False)
    assert saved() < before / 2


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_model("bert").train()
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(ValueError, match=r"^reentrant checkpointing gives captured tensors no gradient"):
        attention_qkv(model, tiny_inputs(model))
    attention_qkv(model.eval(), tiny_inputs(model))  # checkpointing is off in eval mode


def test_restored_after_an_exception() -> None:
    model = tiny_model("bert", attn_implementation="eager")
    inputs = tiny_inputs(model)
    with pytest.raises(ZeroDivisionError), capture(model):
        1 / 0  # noqa: B018
    with pytest.raises(IndexError), capture(model):
        model(input_ids=torch.tensor([[10_000]]))
    assert model.config._attn_implementation == "eager"
    other = tiny_model("bert", seed=1)
    with capture(other) as captured:  # nothing is left behind that would record here
        model(**inputs)
        assert captured == {}
        other(**inputs)


def test_delegates_to_the_function_the_model_had() -> None:
    """Flash attention asks `module.config` for its own name; one registered after this library is found too."""
    seen: list[tuple[str, Any]] = []

    def asks_its_name(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((module.config._attn_implementation, module.layer_idx))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("asks_its_name", asks_its_name)
    AttentionMaskInterface.register("asks_its_name", sdpa_mask)
    model = tiny_model("llama", attn_implementation="asks_its_name")
    inputs = tiny_inputs(model)
    expected = model(**inputs)[0]
    seen.clear()
    with capture(model):
        during = model(**inputs)[0]
    assert seen == [("asks_its_name", layer) for layer in range(4)]
    assert torch.equal(during, expected)
    assert model.config._attn_implementation == "asks_its_name"


def test_cross_attention_is_not_taken_for_the_layers_own() -> None:
    model = tiny_model("bert", is_decoder=True, add_cross_attention=True)
    inputs = {**tiny_inputs(model), "use_cache": False, "encoder_hidden_states": torch.randn(2, 5, 32)}
    keys: list[Tensor] = []
    for path, module in model.named_modules():
        if path.endswith("attention.self.key") and "cross" not in path:
            module.register_forward_hook(lambda *call: keys.append(call[-1]))
    with capture(model, [1, 2, 3, 4]) as captured:
        model(**inputs)
    assert len(keys) == 4
    for layer, key in enumerate(keys, start=1):
        assert torch.equal(captured[layer][1].transpose(1, 2).flatten(2), key)


def test_the_last_of_several_forwards_counts() -> None:
    for family in ("bert", "albert"):  # numbered and counted modules
        model = tiny_model(family)
        first, second = tiny_inputs(model), tiny_inputs(model, seed=1)
        with capture(model, [2]) as captured:
            model(**first)
            model(**second)
        for tensor, exact in zip(captured[2], attention_qkv(model, second, 2), strict=True):
            assert torch.equal(tensor, exact)


class Wrapper(nn.Module):
    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, **inputs: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = attention_qkv(self.teacher, inputs, 3)
        student = attention_qkv(self.student, inputs)
        return sum((a - b).square().mean() for a, b in zip(teacher, student, strict=True))  # type: ignore[return-value]


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13",
    reason="before torch 2.13 dynamo misses that a config changes within the graph, and runs the call eagerly",
)
@pytest.mark.parametrize(("family", "implementation"), [("bert", "sdpa"), ("llama", "eager")])
def test_compiled_without_a_graph_break(family: str, implementation: str) -> None:
    torch._dynamo.reset()
    teacher, student = (tiny_model(family, seed=seed, attn_implementation=implementation) for seed in (0, 1))
    wrapper = Wrapper(teacher, student)
    inputs = tiny_inputs(wrapper.student)
    gradients = []
    for forward in (wrapper, torch.compile(wrapper, fullgraph=True, backend="aot_eager")):
        wrapper.zero_grad()
        forward(**inputs).backward()
        gradients.append([p.grad.clone() for p in wrapper.student.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward(**tiny_inputs(wrapper.student, seed=1))
    assert teacher.config._attn_implementation == student.config._attn_implementation == implementation


def test_layers_count_from_one_and_minus_one_is_the_last() -> None:
    model = tiny_model("distilbert")
    assert num_layers(model) == num_layers(model.config) == 4
    assert [resolve_layer(model, layer) for layer in (1, 4, -1, -4)] == [1, 4, 4, 1]
    for layer in (0, 5, -5):
        with pytest.raises(ValueError, match=rf"layer {layer} does not exist: layers are 1 to 4, or -4 to -1"):
            resolve_layer(model.config, layer)
        with pytest.raises(ValueError, match=rf"layer {layer} does not exist"), capture(model, [layer]):
            pass
    with pytest.raises(ValueError, match=r"layers is \[\]: name at least one layer of 1 to 4"), capture(model, []):
        pass


@pytest.mark.parametrize(("family", "model_type"), [("mpnet", "mpnet"), ("deberta", "deberta-v2")])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # DeBERTa's own
def test_models_that_bypass_the_interface_are_named(family: str, model_type: str, stop: bool) -> None:
    model = tiny_model(family)
    with pytest.raises(ValueError, match=rf"no attention of layers \[-1\] was seen.*{model_type}"):  # noqa: SIM117
        with capture(model, stop=stop):
            model(**tiny_inputs(model))


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match=r"capture takes a transformers model \(PreTrainedModel\), got Linear"):
        attention_qkv(nn.Linear(1, 1), {})  # type: ignore[arg-type]
    bart = tiny_model("bart")
    with (
        pytest.raises(ValueError, match=r"^BartModel is an encoder-decoder: capture model\.get_encoder\(\)"),
        capture(bart),
    ):
        pass
    assert len(attention_qkv(bart.get_encoder(), tiny_inputs(bart))) == 3
    with pytest.raises(ValueError, match="CLIPConfig has no num_hidden_layers"):
        num_layers(CLIPConfig())


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "llama", "vit"])
def test_stopping_changes_no_gradient(family: str) -> None:
    """The relations' gradients with both models run to their ends, and with both stopped: the same bits."""
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    inputs = tiny_inputs(teacher)
    mask = inputs.get("attention_mask")
    gradients = []
    for stop in (False, True):
        with capture(teacher, [3], stop=stop) as of_teacher, torch.no_grad():
            teacher(**inputs)
        with capture(student, [-1], stop=stop) as of_student:
            student(**inputs)
        loss = fused_minilm_loss(of_teacher[3], of_student[-1], ("qk", "vv"), attention_mask=mask)
        parameters = list(student.parameters())
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    whole, stopped = gradients
    assert sum(g is not None for g in whole) > 10
    for expected, gradient in zip(whole, stopped, strict=True):
        assert (expected is None) == (gradient is None)
        assert expected is None or torch.equal(expected, gradient)


WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64}
TEXT = {**WIDTHS, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
CODERS = {
    **{"vocab_size": 60, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 64, **IDS},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"pad_token_id": 0, "decoder_start_token_id": 1},
}
SOUND = {
    **{**WIDTHS, "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}
GEMMA = {**TEXT, **IDS, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 5}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

# Where the scale goes: name of the classes and arguments of the config.
SCALES = {
    "Bert": TEXT,  # 1/√D is left to the core
    "Roberta": {**TEXT, **IDS},
    "Albert": {**TEXT, "embedding_size": 16},
    "ModernBert": {**TEXT, **IDS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    "Esm": {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 4},  # into q, before rotary position
    "OPT": {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},  # into q
    "Whisper": {**CODERS, "num_mel_bins": 8, "max_source_positions": 10},
    "Bart": CODERS,
    "T5": {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4},  # nowhere
    "Gemma2": {**GEMMA, "attn_logit_softcapping": None},  # of the config
    "Gemma3Text": GEMMA,
    "Granite": {**TEXT, **IDS, "attention_multiplier": 0.3},
    "GPT2": {
        **{"vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 3, **IDS},
        "scale_attn_by_inverse_layer_idx": True,  # another in every layer
    },
    "Qwen3": {**TEXT, **IDS, "num_key_value_heads": 2, "head_dim": 16},
    "CLIPText": {**TEXT, **IDS},
    "Wav2Vec2": SOUND,
    "Hubert": SOUND,
    "ViT": {**WIDTHS, "image_size": 16, "patch_size": 8},
    "Dinov2": {**WIDTHS, "image_size": 16, "patch_size": 8},
}


def made(prefix: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """In eval mode, with large weights; the encoder of an encoder-decoder, without an additive bias."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**config))
    if prefix in ("Whisper", "Bart", "T5"):
        model = model.get_encoder()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.0 if "attention_bias" in name else 0.3)
    return model.eval()


def its_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    sizes = {"pixel_values": (2, 3, 16, 16), "input_values": (2, 200), "input_features": (2, 8, 20)}
    size = sizes.get(model.main_input_name)
    return tiny_inputs(model) if size is None else {model.main_input_name: torch.randn(size)}


@pytest.mark.parametrize("family", SCALES)
def test_softmax_of_q_and_k_is_the_models_own_attention(family: str) -> None:
    model = made(family, **SCALES[family])
    assert own_attention_matches(model, its_inputs(model))


def test_a_scaled_query_has_the_gradient_of_its_projection() -> None:
    """OPT's projection, scaled by 1/√D before the core and by √D in capture, is itself again; BERT's is untouched."""
    model = made("OPT", **SCALES["OPT"])
    projection: nn.Linear = model.decoder.layers[-1].self_attn.q_proj
    inputs, outputs = tiny_inputs(model), []
    projection.register_forward_hook(lambda *call: outputs.append(call[-1]))
    query = attention_qkv(model, inputs)[0].transpose(1, 2).flatten(2)
    torch.testing.assert_close(query, outputs[0])
    found, exact = (
        torch.autograd.grad(x.square().sum(), projection.weight, retain_graph=True)[0] for x in (query, outputs[0])
    )
    torch.testing.assert_close(found, exact)
    assert attention_qkv(made("Bert", **TEXT), inputs)[0]._base is not None


def kept_in_place(model: PreTrainedModel, layers: list[int], **config: int) -> tuple[PreTrainedModel, list[Tensor]]:
    """The model with some of its layers, and a list that every forward fills with their v, bottom to top."""
    path = next(path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    parent, _, name = path.rpartition(".")
    all_layers = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, nn.ModuleList([all_layers[layer] for layer in layers]))
    for key, value in config.items():
        setattr(model.config, key, value)
    values: list[Tensor] = []
    for module in dict.fromkeys(model.get_submodule(path)):
        for inner, projection in module.named_modules():
            if inner.split(".")[-1] in ("value", "Wqkv", "v_proj", "c_attn"):
                projection.register_forward_hook(lambda *call: values.append(call[-1][..., -32:]))
    return model, values


@pytest.mark.parametrize("layers", [[1, 3, 5], [0, 2, 3], [4, 1], [0, 0, 2, 2], [5]])
@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_layers_kept_in_place_count_as_they_stand(family: str, layers: list[int]) -> None:
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model, values = kept_in_place(tiny_model(family, **{name: 6}), layers, num_hidden_layers=len(layers))
    inputs = {**tiny_inputs(model), **({"use_cache": False} if family in ("gpt2", "llama") else {})}
    numbers = range(1, len(layers) + 1)
    with capture(model, [*numbers, -1]) as captured:
        model(**inputs)
    own = list(values)
    assert len(own) == len(layers)
    for number, value in zip([*numbers, -1], [*own, own[-1]], strict=True):
        assert torch.equal(captured[number][2].transpose(1, 2).flatten(2), value)
        assert torch.equal(attention_qkv(model, inputs, number)[2], captured[number][2])


def test_only_the_last_layer_kept_in_place_is_frozen() -> None:
    model, _ = kept_in_place(tiny_model("bert", num_hidden_layers=12), [0, 3, 6, 9], num_hidden_layers=4)
    frozen = {name.split(".")[2] for name in freeze_unused(model) if name.startswith("encoder.layer.")}
    assert frozen == {"3"}


@pytest.mark.parametrize("counted", [6, 2])
def test_a_config_that_counts_other_layers_is_refused(counted: int) -> None:
    model, _ = kept_in_place(tiny_model("bert", num_hidden_layers=6), [1, 3, 5], num_hidden_layers=counted)
    sentence = (
        rf"^BertModel counts {counted} layers in its config \(num_hidden_layers\) and holds 3 in encoder\.layer: "
        r"set model\.config\.num_hidden_layers = 3$"
    )
    for layer in (1, -1):
        with pytest.raises(ValueError, match=sentence):
            attention_qkv(model, tiny_inputs(model), layer)


def test_a_decoder_counts_its_own_layers() -> None:
    decoder = transformers.BartModel(transformers.BartConfig(**CODERS)).eval().get_decoder()
    assert num_layers(decoder) == 2
    with capture(decoder, [1, 2]) as captured:
        decoder(**tiny_inputs(decoder), use_cache=False)
    assert not torch.equal(captured[1][0], captured[2][0])


def test_albert_groups_run_one_after_another() -> None:
    model = made("Albert", **{**SCALES["Albert"], "num_hidden_layers": 5, "num_hidden_groups": 2})
    queries: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("query"):
            module.register_forward_hook(lambda *call: queries.append(call[-1]))
    with capture(model, range(1, 6)) as captured:
        model(**tiny_inputs(model))
    own = list(queries)
    assert len(own) == 5
    for layer, query in enumerate(own, start=1):
        assert torch.equal(captured[layer][0].transpose(1, 2).flatten(2), query)
    assert own_attention_matches(model, tiny_inputs(model))


@pytest.mark.parametrize("layer", [1, 2, -1])
def test_several_attentions_in_a_layer_are_refused(layer: int) -> None:
    albert = made("Albert", **{**SCALES["Albert"], "num_hidden_layers": 4, "inner_group_num": 2})
    swin = made("Swin", **STAGES)
    for model, inputs in ((albert, tiny_inputs(albert)), (swin, {"pixel_values": torch.randn(1, 3, 32, 32)})):
        with pytest.raises(ValueError, match=rf"^{type(model).__name__} has several attentions \("):
            attention_qkv(model, inputs, layer)


@pytest.mark.parametrize(("family", "where"), [("Wav2Vec2", "config.layerdrop"), ("OPT", "decoder.layerdrop")])
def test_layerdrop_is_refused_in_training_mode(family: str, where: str) -> None:
    model = made(family, **SCALES[family], layerdrop=0.5)
    inputs = its_inputs(model)
    attention_qkv(model, inputs)
    model.train()
    sentence = rf"^{family}Model in training mode leaves out .*: set model\.{where} = 0\.0, it is 0\.5$"
    with pytest.raises(ValueError, match=sentence):
        attention_qkv(model, inputs)
    owner, _, name = where.rpartition(".")
    setattr(getattr(model, owner), name, 0.0)
    attention_qkv(model, inputs)


def test_what_did_not_run_is_told_apart() -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=r"seen: no forward of BertModel ran inside capture$"), capture(model):
        pass
    model.encoder.layer[2].forward = lambda hidden, *_, **__: hidden
    with pytest.raises(ValueError, match=r"seen: the forward of BertModel ran that of layers \[1, 2, 4\]$"):
        attention_qkv(model, tiny_inputs(model), 3)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("MegatronBert", "MegatronBertSelfAttention"), ("Luke", "LukeSelfAttention"), ("Bloom", "BloomAttention")],
)
def test_the_class_that_computes_attention_by_itself_is_named(family: str, attention: str) -> None:
    model = made(family, **TEXT)
    sentence = rf"{attention} of models of type '[\w-]+' computes attention by itself, not through transformers'"
    with pytest.raises(ValueError, match=sentence):
        attention_qkv(model, tiny_inputs(model))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast_gives_one_type_behind_rotary_position(family: str) -> None:
    model = tiny_model(family)
    inputs = {**tiny_inputs(model), "use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs)[0]
        with capture(model, [4]) as captured:
            during = model(**inputs)[0]
    assert {tensor.dtype for tensor in captured[4]} == {torch.bfloat16}
    assert torch.equal(during, expected)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13",
    reason="before torch 2.13 dynamo misses that a config changes within the graph, and runs the call eagerly",
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which dynamo itself reads
def test_a_compiled_model_runs_compiled() -> None:
    torch._dynamo.reset()
    model = tiny_model("bert", "ForMaskedLM", num_hidden_layers=2)
    graphs: list[Any] = []
    inputs = tiny_inputs(model)
    compiled = torch.compile(model, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    exact = attention_qkv(model, inputs, 2)
    assert not graphs
    needs = Needs(qkv=(2,), output=True)
    with_output, exact_output = (observe(each, inputs, needs).qkv[2] for each in (compiled, model))
    assert not graphs
    captured = attention_qkv(compiled, inputs, 2)
    assert graphs
    for found, expected in ((captured, exact), (with_output, exact_output)):
        for tensor, same in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, same)


def test_parallel_wrappers_are_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"got DataParallel: wrap a module in DataParallel whose forward captures"):
        attention_qkv(nn.DataParallel(tiny_model("bert")), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("needs", [Needs(hidden=(0, 2)), Needs(qkv=(1,), hidden=(2,)), Needs(qkv=(3,), hidden=(2,))])
def test_what_was_observed_is_freed_with_its_last_reference(needs: Needs) -> None:
    model = tiny_model("bert")
    gc.collect()
    gc.disable()
    try:
        observed = observe(model, tiny_inputs(model), needs)
        alive = [weakref.ref(hidden) for hidden in observed.hidden.values()]
        del observed
        assert [reference for reference in alive if reference() is not None] == []
    finally:
        gc.enable()
