"""Loading teachers: their own head where it is asked for, their tokenizer or image processor, and what goes wrong."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from minilm.teachers import load_teacher

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


def save(folder: Path, family: str, head: str, **config: int) -> str:
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
    message = r"^the teacher '.*' has no trained head \({}\): leave out --output_weight$"
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
    tiny_model("bert").save_pretrained(folder)
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
