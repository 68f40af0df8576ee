"""Loading teachers: their own head where it is asked for, their tokenizer or image processor, and what goes wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny_model
from tiny_text import save_teacher, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    ClapConfig,
    CLIPConfig,
    DataCollatorWithPadding,
    OPTConfig,
    OPTModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperConfig,
    XLNetConfig,
    XLNetModel,
)

from minilm import attention_qkv
from minilm.models.teachers import load_teacher, read_teacher, resolve_length

HEADS = [
    ("bert", "ForMaskedLM"),
    ("roberta", "ForMaskedLM"),
    ("distilbert", "ForMaskedLM"),
    ("electra", "ForMaskedLM"),
    ("modernbert", "ForMaskedLM"),
    ("llama", "ForCausalLM"),
    ("gpt2", "LMHeadModel"),
    ("bert", "ForSequenceClassification"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save(folder: Path, family: str, head: str, **config: Any) -> str:
    tiny_model(family, head, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_with_its_own_head(family: str, head: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family, head)
    teacher, tokenizer = load_teacher(folder, head=True)
    saved = tiny_model(family, head)
    assert type(teacher) is type(saved)
    weights = teacher.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.state_dict().items())
    assert len(tokenizer) == 57
    assert type(load_teacher(folder)[0]) is type(saved.base_model)


def test_berts_two_pretraining_heads(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", "ForPreTraining")
    teacher, _ = load_teacher(folder, head=True)
    assert type(teacher).__name__ == "BertForMaskedLM"
    saved = tiny_model("bert", "ForPreTraining").state_dict()
    assert torch.equal(
        teacher.state_dict()["cls.predictions.transform.dense.weight"], saved["cls.predictions.transform.dense.weight"]
    )


def test_loads_float32(tmp_path: Path) -> None:
    tiny_model("bert", "ForMaskedLM").half().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for head in (False, True):
        assert load_teacher(str(tmp_path), head=head)[0].dtype == torch.float32


def test_without_a_trained_head(tmp_path: Path) -> None:
    message = r"^the teacher '.*' has no trained head \({}\): leave out --output_weight, or take another --objective$"
    base = save(tmp_path / "base", "bert", "Model")
    with pytest.raises(ValueError, match=message.format("it was saved as BertModel")):
        load_teacher(base, head=True)
    discriminator = save(tmp_path / "discriminator", "electra", "ForPreTraining")
    with pytest.raises(ValueError, match=message.format(r"its weights lack generator_\S+")):
        load_teacher(discriminator, head=True)
    # The config of a masked LM beside weights without one.
    renamed = save(tmp_path / "renamed", "bert", "Model")
    config = Path(renamed) / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("BertModel", "BertForMaskedLM"), encoding="utf-8")
    with pytest.raises(ValueError, match=message.format(r"its weights lack cls\.predictions\.\S+")):
        load_teacher(renamed, head=True)
    load_teacher(renamed)


def test_a_classifiers_pooler_is_part_of_its_head(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", "ForMaskedLM")  # no pooler
    config = Path(folder) / "config.json"
    text = config.read_text(encoding="utf-8").replace("BertForMaskedLM", "BertForSequenceClassification")
    config.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no trained head \(its weights lack bert\.pooler\.dense\.bias\)"):
        load_teacher(folder, head=True)


@pytest.mark.parametrize("head", [False, True])
def test_weights_of_another_depth(head: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", "ForMaskedLM")
    config = Path(folder) / "config.json"
    text = config.read_text(encoding="utf-8").replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    config.write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"^the weights of the teacher '.*' lack 16 of its tensors, \S*encoder\.layer\.4"
    ):
        load_teacher(folder, head=head)


@pytest.mark.parametrize("head", [False, True])
def test_folders_that_do_not_load(head: bool, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^cannot load the teacher '.*nowhere', which is no folder here, from the hub: "
    ):
        load_teacher(str(tmp_path / "nowhere"), head=head)
    with pytest.raises(ValueError, match=r"^cannot load the teacher '[^']*': "):
        load_teacher(str(tmp_path), head=head)
    tiny_model("bert", "ForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^the tokenizer of '.*' has no tokens but 5 special ones: are its files there"
    ):
        load_teacher(str(tmp_path), head=head)


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    few = save(tmp_path / "few", "bert", "Model", vocab_size=50)
    with pytest.raises(ValueError, match=r"the tokenizer of '.*' has 57 tokens, the model embeds 50"):
        load_teacher(few)
    unpadded = tiny_tokenizer()
    unpadded.pad_token = None
    folder = tmp_path / "unpadded"
    tiny_model("bert", pad_token_id=None).save_pretrained(folder)
    unpadded.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the tokenizer of '.*' has no padding token and no end-of-text token"):
        load_teacher(str(folder))
    unpadded.eos_token = "[SEP]"
    unpadded.save_pretrained(folder)
    tokenizer = load_teacher(str(folder))[1]
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert tokenizer.pad_token == "[SEP]"


@pytest.mark.parametrize("head", [False, True])
def test_vision_teacher_comes_with_its_image_processor(head: bool, tmp_path: Path) -> None:
    image_processor = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "vit"
    tiny_model("vit", "ForImageClassification", num_labels=3).save_pretrained(folder)
    image_processor.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    teacher, processor = load_teacher(str(folder), head=head)
    assert not isinstance(processor, PreTrainedTokenizerBase)
    pixels = processor(image.new("RGB", (20, 30), "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    with torch.no_grad():
        output = teacher(pixel_values=pixels)
    assert output[0].shape == ((1, 3) if head else (1, 5, 32))


def test_vision_teacher_without_an_image_processor(tmp_path: Path) -> None:
    tiny_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^cannot load the teacher '.*': .*image processor"):
        load_teacher(str(tmp_path))


def change_config(folder: str, file: str = "config.json", **values: Any) -> None:
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def add_weights(folder: str, *names: str) -> None:
    path = Path(folder) / "model.safetensors"
    extra = {name: torch.zeros(3) for name in names}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "saved_as", "added"),
    [
        ("bert", "Model", "encoder.layer.0.attention.self.distance_embedding.weight"),
        ("bert", "ForMaskedLM", "bert.encoder.layer.0.attention.self.distance_embedding.weight"),
        ("bert", "ForMaskedLM", "bert.final_norm.weight"),
        ("roberta", "ForMaskedLM", "roberta.encoder.layer.1.adapter.down.weight"),
        ("gpt2", "LMHeadModel", "transformer.h.7.ln_1.weight"),
        ("llama", "ForCausalLM", "model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("modernbert", "Model", "layers.2.attn.gate.weight"),
        ("vit", "ForImageClassification", "vit.embeddings.register_tokens"),
    ],
)
def test_weights_that_the_class_does_not_take(family: str, saved_as: str, added: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family, saved_as)
    add_weights(folder, added, added + ".2")
    for head in (False, True)[: 1 if saved_as == "Model" else 2]:
        with pytest.raises(ValueError, match=rf"has weights that \w+ does not take, {added} for one \(of 2\)"):
            load_teacher(folder, head=head)


def test_fewer_layers_in_the_config_than_in_the_weights(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", "ForMaskedLM")
    change_config(folder, num_hidden_layers=-1)  # none at all
    with pytest.raises(ValueError, match=r"does not take, bert\.encoder\.layer\.0\.\S+ for one \(of 64\)"):
        load_teacher(folder)
    change_config(folder, num_hidden_layers=3)
    for head in (False, True):
        with pytest.raises(ValueError, match=r"does not take, bert\.encoder\.layer\.3\.\S+ for one \(of 16\)"):
            load_teacher(folder, head=head)


@pytest.mark.parametrize(
    ("family", "saved_as", "added"),
    [
        ("bert", "Model", "classifier.weight"),
        ("bert", "Model", "encoder.layer.0.attention.self.position_ids"),
        ("bert", "ForMaskedLM", "bert.pooler.dense.extra"),
        ("bert", "ForPreTraining", "qa_outputs.weight"),
        ("electra", "ForPreTraining", "electra.embeddings.position_ids"),
        ("gpt2", "LMHeadModel", "transformer.h.0.attn.masked_bias"),
        ("llama", "ForCausalLM", "score.weight"),
        ("vit", "Model", "embeddings.mask_token"),
    ],
)
def test_heads_poolers_and_constants_may_be_left_out(
    family: str, saved_as: str, added: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, family, saved_as)
    add_weights(folder, added)
    if family == "vit":
        monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", lambda *_, **__: object())
    load_teacher(folder)


def test_weights_of_other_sizes_and_no_numbers(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", "Model")
    change_config(folder, vocab_size=80, intermediate_size=64)
    message = r"embeddings\.word_embeddings\.weight is \(60, 32\), the config makes it \(80, 32\) \(of 13\)"
    with pytest.raises(ValueError, match=message):
        load_teacher(folder)
    change_config(folder, vocab_size=VOCABULARY, intermediate_size=128)
    path = Path(folder) / "model.safetensors"
    good = load_file(path)
    for number in ("nan", "inf", "-inf"):
        weights = {name: tensor.clone() for name, tensor in good.items()}
        weights["encoder.layer.1.output.dense.weight"][3, 5] = float(number)
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"not finite numbers: encoder\.layer\.1\.output\.dense\.weight holds"):
            load_teacher(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 90868376\n"


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: Path(folder / name).write_text(text, encoding="utf-8") and None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def in_turn(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100_000])


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(str(folder), **values)


class Harmful:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code of a checkpoint was run",)


def as_bin(content: Any) -> Callable[[Path], None]:
    return in_turn(remove("model.safetensors"), lambda folder: torch.save(content, folder / "pytorch_model.bin"))


def cut_bin(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:800])


BROKEN = {
    "lfs": (write("model.safetensors", POINTER), r"model\.safetensors is a Git LFS pointer of \d+ bytes.*git lfs pull"),
    "lfs-tokenizer": (write("tokenizer.json", POINTER), r"its tokenizer: tokenizer\.json is a Git LFS pointer"),
    "lfs-bin": (
        in_turn(remove("model.safetensors"), write("pytorch_model.bin", POINTER)),
        r"pytorch_model\.bin is a Git LFS pointer",
    ),
    "cut": (cut, r"model\.safetensors has 100,000 bytes where its header tells of 2\d\d,\d\d\d"),
    "no-weights-inside": (
        write("model.safetensors", "<html>"),
        r"model\.safetensors \(6 bytes\) is no safetensors",
    ),
    "no-bin": (
        in_turn(remove("model.safetensors"), write("pytorch_model.bin", "<html>")),
        r"pytorch_model\.bin \(6 bytes\) holds no weights",
    ),
    "empty": (write("model.safetensors", ""), r"model\.safetensors is empty"),
    "shard": (
        in_turn(
            remove("model.safetensors"),
            write(
                "model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "m-00001-of-00002.safetensors"}}'
            ),
        ),
        r"index\.json names m-00001-of-00002\.safetensors, which is not there",
    ),
    "index": (
        in_turn(remove("model.safetensors"), write("model.safetensors.index.json", "{}")),
        r"model\.safetensors\.index\.json has no weight_map",
    ),
    "link": (
        in_turn(remove("model.safetensors"), lambda folder: (folder / "model.safetensors").symlink_to("../blob")),
        r"model\.safetensors is a link to \.\./blob, which is not there",
    ),
    "cut-bin": (in_turn(as_bin({"a": torch.zeros(9)}), cut_bin), r"pytorch_model\.bin ends after \d+ bytes, before"),
    "pickled-code": (as_bin({"a": Harmful()}), r"pytorch_model\.bin runs code when it is read, which is never done"),
    "config": (write("config.json", '{"model_type": "bert",'), r"config\.json is no JSON: .*line 1"),
    "config-list": (write("config.json", "[]"), r"its config\.json names no model_type"),
    "tokenizer": (write("tokenizer.json", "{}"), r"its tokenizer: tokenizer\.json holds no tokenizer: "),
    "kind": (set_config(model_type="zork"), r"its model_type 'zork' is unknown to transformers .*pip install -U"),
    "code": (
        set_config(model_type="zork", auto_map={"AutoConfig": "z.Z", "AutoModel": "z.Z"}),
        r"its model is custom code \(model_type 'zork'\), which is never run",
    ),
    "quantised": (
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"are quantised \(gptq\): name its unquantised weights",
    ),
    "adapter": (write("adapter_config.json", "{}"), r"it holds a PEFT adapter: merge it"),
    "tensorflow": (
        in_turn(remove("model.safetensors"), write("tf_model.h5", "x")),
        r"it holds TensorFlow weights \(tf_model\.h5\)",
    ),
    "gguf": (in_turn(remove("model.safetensors", "config.json"), write("q.gguf", "x")), r"it holds GGUF weights"),
    "weightless": (remove("model.safetensors"), r"the config\.json of a bert, but neither model\.safetensors nor"),
    "configless": (remove("config.json"), r"it holds no config\.json"),
    "sizes": (set_config(num_attention_heads=5), r"cannot load the teacher '[^']*': "),
    "types": (set_config(hidden_size="many"), r"cannot load the teacher '[^']*': "),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_folders_are_told_in_one_sentence(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_teacher(tmp_path / "teacher")
    change, message = BROKEN[fault]
    change(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_folder_to_name_instead(tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        with pytest.raises(ValueError, match="cannot load the teacher") as caught:
            load_teacher(str(folder))
        return str(caught.value)

    steps = tmp_path / "run"
    for step in (9, 10):
        save_teacher(steps / f"checkpoint-{step}")
    assert told(steps).endswith(f"--teacher {steps / 'checkpoint-10'}")
    sentence = tmp_path / "st"
    save_teacher(sentence / "0_Transformer")
    (sentence / "1_Pooling").mkdir()
    (sentence / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert told(sentence).endswith(f"--teacher {sentence / '0_Transformer'}")
    (sentence / "modules.json").write_text("[]")
    assert told(sentence).endswith(
        f"sentence-transformers folder: name its Transformer, --teacher {sentence}/0_Transformer"
    )
    weights = sentence / "0_Transformer" / "model.safetensors"
    assert told(weights).endswith(f"it is a file: name the folder that holds it, --teacher {weights.parent}")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", " ", "two/slashes/here"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot load the teacher .* which is no folder here, from the hub: \w"):
        load_teacher(name)


def test_a_llama_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its tokenizer: no tokenizer's files are there: save the one"):
        load_teacher(str(tmp_path))


def test_models_of_several_parts(tmp_path: Path) -> None:
    t5 = save(tmp_path / "t5", "t5", "Model")
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(t5\)"):
        load_teacher(t5)
    WhisperConfig().save_pretrained(tmp_path / "whisper")
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(whisper\)"):
        load_teacher(str(tmp_path / "whisper"))
    CLIPConfig().save_pretrained(tmp_path / "clip")  # told before weights are looked for
    with pytest.raises(ValueError, match=r"is several models in one \(clip: text_config, vision_config\): save"):
        load_teacher(str(tmp_path / "clip"))
    ClapConfig().save_pretrained(tmp_path / "clap")  # of one width in both
    with pytest.raises(ValueError, match=r"is several models in one \(clap: audio_config, text_config\): save"):
        load_teacher(str(tmp_path / "clap"))
    half = save(tmp_path / "half", "t5", "EncoderModel")
    with pytest.raises(ValueError, match=r"lack \d+ of .*: they are of a T5EncoderModel, and transformers loads a T5M"):
        load_teacher(half)


def test_a_tokenizer_that_takes_no_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, "bert", "Model")

    def boxes(*_: Any, **__: Any) -> None:
        raise TypeError("words must be of type list[str]")

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", boxes)
    with pytest.raises(ValueError, match=r"does not take a plain text: TypeError words must be of type list"):
        load_teacher(folder)


def test_padding_is_on_the_right_and_saved_as_it_was(tmp_path: Path) -> None:
    folder = save(tmp_path / "teacher", "gpt2", "Model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    change_config(folder, "tokenizer_config.json", padding_side="left", truncation_side="left")
    model, ready, saved = read_teacher(folder)
    assert isinstance(ready, PreTrainedTokenizerBase)
    rows = [ready(text) for text in ("ab cd", "ab cd ef gh ij kl mn op")]
    together, alone = (
        attention_qkv(model, DataCollatorWithPadding(ready)(part))[0].detach() for part in (rows, rows[:1])
    )
    torch.testing.assert_close(together[:1, :, : alone.shape[2]], alone)
    for name, kept in (("read", saved), ("again", AutoTokenizer.from_pretrained(folder))):
        kept.save_pretrained(tmp_path / name)
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "read" / file.name).read_bytes()
    assert (saved.padding_side, saved.truncation_side, saved.pad_token) == ("left", "left", None)


def classifier(folder: Path, tokenizer: dict[str, Any], **config: Any) -> tuple[Any, Any]:
    saved = tiny_model("llama", "ForSequenceClassification", num_labels=3, **config)
    saved.save_pretrained(folder)
    given = tiny_tokenizer()
    for name, value in tokenizer.items():
        setattr(given, name, value)
    given.save_pretrained(folder)
    return load_teacher(str(folder), head=True)


@pytest.mark.parametrize(
    ("tokenizer", "config", "expected"),
    [
        ({}, {"pad_token_id": None}, 0),
        ({}, {"pad_token_id": 7}, 0),  # a letter's
        ({"pad_token": None, "eos_token": "[SEP]"}, {"pad_token_id": 0}, 0),
        # [SEP] ends every text: padding with it would have the model read the token before.
        ({"pad_token": None, "eos_token": "[SEP]"}, {"pad_token_id": None}, 1),
    ],
)
def test_a_classifier_reads_the_same_token_in_a_batch_as_alone(
    tokenizer: dict[str, Any], config: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    model, ready = classifier(tmp_path, tokenizer, **config)
    inputs = [ready([text], return_token_type_ids=False, return_tensors="pt") for text in ("ab cd",)]
    batch = ready(["ab cd", "ab cd ef gh"], padding=True, return_token_type_ids=False, return_tensors="pt")
    assert model.config.pad_token_id == ready.pad_token_id == expected
    with torch.no_grad():
        together, alone = model(**batch).logits[0], model(**inputs[0]).logits[0]
        body = model.model(**inputs[0]).last_hidden_state
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(alone, model.score(body)[0, -1])


def test_an_output_that_depends_on_padding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertForMaskedLM

    folder = save(tmp_path, "bert", "ForMaskedLM")
    forward = BertForMaskedLM.forward

    def blind(self: Any, input_ids: Tensor, **_: Any) -> Any:
        return forward(self, input_ids)

    load_teacher(folder, head=True)
    monkeypatch.setattr(BertForMaskedLM, "forward", blind)
    with pytest.raises(ValueError, match=r"BertForMaskedLM of '.*' gives a text another output in a batch than alone"):
        load_teacher(folder, head=True)


@pytest.mark.parametrize(
    ("family", "config", "positions"),
    [
        ("bert", {"max_position_embeddings": 64}, 64),
        ("roberta", {"max_position_embeddings": 64}, 63),  # padding has position 0
        ("gpt2", {"n_positions": 40}, 40),
        ("llama", {"max_position_embeddings": 48}, 48),
        ("opt", {}, 30),
        ("xlnet", {}, None),
        ("t5", {}, None),
    ],
)
def test_no_text_is_longer_than_the_positions(family: str, config: dict[str, Any], positions: int | None) -> None:
    if family == "opt":
        model: Any = OPTModel(
            OPTConfig(vocab_size=60, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, ffn_dim=32,
                      num_attention_heads=4, max_position_embeddings=30)
        )  # fmt: skip
    elif family == "xlnet":
        model = XLNetModel(XLNetConfig(vocab_size=60, d_model=32, n_layer=1, n_head=4, d_inner=32))
    else:
        model = tiny_model(family, **config)
    tokenizer = tiny_tokenizer()
    assert resolve_length(model, tokenizer, None) == (positions or 512)
    assert resolve_length(model, tokenizer, 3) == 3
    if positions is None:
        assert resolve_length(model, tokenizer, 4000) == 4000
        return
    with torch.no_grad():
        model(input_ids=torch.full((1, positions), 5))
    with pytest.raises(ValueError, match=rf"max_length {positions + 1} is more than the teacher's {positions} pos"):
        resolve_length(model, tokenizer, positions + 1)


def test_lengths_that_leave_no_room() -> None:
    for length in (2, 1, 0, -4):
        with pytest.raises(ValueError, match=rf"max_length {length} leaves no room beside the tokenizer's 2 special"):
            resolve_length(tiny_model("bert"), tiny_tokenizer(), length)
    with pytest.raises(ValueError, match="max_length 2 leaves no room"):
        resolve_length(tiny_model("bert", max_position_embeddings=2), tiny_tokenizer(), None)


@pytest.mark.parametrize("flags", [[], ["--streaming"], ["--packing"], ["--streaming", "--packing"]])
def test_the_students_tokenizer_is_the_teachers(
    flags: list[str], teacher: str, data: str, command: CommandLine, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(50)
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=50)
    tokenizer.save_pretrained(teacher)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "expected")
    fixed = ["--max_steps", "2", "--save_steps", "1", "--max_length", "16", "--report_to", "none", "--use_cpu"]
    code, _, told = command(
        "--teacher", teacher, "--data", data, "--output_dir", "out", "--student_num_layers", "2", *fixed, *flags
    )
    assert code == 0, told
    for folder in ("out", "out/checkpoint-1"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), folder


def test_a_teacher_that_does_not_load_ends_with_one_line(
    teacher: str, data: str, command: CommandLine, tmp_path: Path
) -> None:
    cut(Path(teacher))
    code, _, told = command(
        "--teacher", teacher, "--data", data, "--output_dir", "out", "--student_num_layers", "2", "--use_cpu"
    )
    assert code == 2
    assert told.startswith("minilm-train: error: cannot load the teacher")
    assert told.count("\n") == 1
