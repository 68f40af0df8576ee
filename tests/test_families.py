"""Every family that README.md names, and what of it was seen to work: the table there is what this file makes.

    python tests/test_families.py --write       # puts the table into README.md

Of each a tiny random model is tried: q and k that `capture` gives against the model's own attention, a smaller student,
five steps of training and one in bfloat16, the student loaded from where it was saved, packed texts against the same
texts one by one.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from own_attention import own_attention_errors
from tiny_models import VOCABULARY, is_there, tiny_encoder, tiny_inputs
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, TrainingArguments

from minilm import DistillationTrainer, MiniLMLoss, attention_qkv, build_student
from minilm.data.packing import PackingCollator
from minilm.models.batches import check_packable, model_inputs, relation_qkv
from minilm.models.probes import check_no_films, is_causal, probe_inputs

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- families -->", "<!-- end -->"

# By what they are for: the name in README.md by that of tests/tiny_models.py.
TEXT = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "camembert": "CamemBERT",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "albert": "ALBERT",
    "mobilebert": "MobileBERT",
    "modernbert": "ModernBERT",
    "eurobert": "EuroBERT",
    "nomic_bert": "NomicBERT",
    "jina_embeddings_v3": "Jina v3",
    "ernie": "ERNIE",
    "xmod": "X-MOD",
    "roc_bert": "RoCBert",
    "data2vec-text": "Data2Vec-Text",
    "esm": "ESM-2",
    "layoutlm": "LayoutLM",
    "embeddinggemma": "EmbeddingGemma",
    "clip_text_model": "CLIP text",
    "t5": "T5 encoder",
}
DECODERS = {
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "modernbert-decoder": "ModernBERT decoder",
    "phi": "Phi",
    "phi3": "Phi-3",
    "opt": "OPT",
    "smollm3": "SmolLM3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "granite": "Granite",
    "starcoder2": "StarCoder2",
    "cohere": "Cohere",
}
VISION = {
    "vit": "ViT",
    "deit": "DeiT",
    "vit_msn": "ViT-MSN",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3",
    "beit": "BEiT",
    "ijepa": "I-JEPA",
    "siglip_vision_model": "SigLIP vision",
    "clip_vision_model": "CLIP vision",
    "videomae": "VideoMAE",
    "vivit": "ViViT",
}
AUDIO = {
    "wav2vec2": "wav2vec 2.0",
    "hubert": "HuBERT",
    "audio-spectrogram-transformer": "AST",
    "whisper": "Whisper encoder",
}
KINDS = {"Text encoders": TEXT, "Decoders": DECODERS, "Images and films": VISION, "Sound": AUDIO}
UNSUPPORTED = {
    "deberta": "DeBERTa",
    "mpnet": "MPNet",
    "megatron-bert": "MegatronBERT",
    "rembert": "RemBERT",
    "roformer": "RoFormer",
    "luke": "LUKE",
    "convbert": "ConvBERT",
    "longformer": "Longformer",
    "xlnet": "XLNet",
    "falcon": "Falcon",
    "bloom": "BLOOM",
    "mpt": "MPT",
    "xglm": "XGLM",
    "gpt_neo": "GPT-Neo",
    "blip_vision_model": "BLIP vision",
    "timesformer": "TimeSformer",
    "swin": "Swin",
    "swinv2": "Swin V2",
    "data2vec-vision": "Data2Vec-Vision",
    "wavlm": "WavLM",
}
SUPPORTED = {**TEXT, **DECODERS, **VISION, **AUDIO}
# What a model does to its scores beside q kᵀ/√d; a relation is that product alone.
BESIDE = {"gemma2": "softcap", "t5": "position bias", "beit": "position bias"}


class Row(NamedTuple):
    attention: str
    student: str
    packing: str
    bf16: str
    command: str


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trained(
    teacher: PreTrainedModel, student: PreTrainedModel, folder: str, steps: int, **options: Any
) -> DistillationTrainer:
    args = TrainingArguments(
        folder,
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **options,
    )
    inputs = tiny_inputs(teacher, (11, 11, 11, 11))
    trainer = DistillationTrainer(
        teacher=teacher,
        student=student,
        criterion=MiniLMLoss(("qk", "vv"), causal=is_causal(teacher)),
        args=args,
        train_dataset=[{name: tensor[i] for name, tensor in inputs.items()} for i in range(4)],
        data_collator=stack,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == steps
    assert all(0 < loss < float("inf") for loss in losses)
    return trainer


def loads_with(student: PreTrainedModel, folder: str) -> str:
    """The name of what loads the saved student whole: `AutoModel`, or its class where `AutoModel` makes another."""
    name = "AutoModel"
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    if type(loaded) is not type(student):
        name = type(student).__name__
        loaded, info = type(student).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = tiny_inputs(student)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs)[0], student.eval()(**inputs)[0])
    return name


def packing_of(model: PreTrainedModel) -> str:
    """Whether it is refused; if not, texts longer than every window give packed what they give one by one."""
    if model.main_input_name != "input_ids":
        return "–"
    try:
        check_packable(model)
    except ValueError as refusal:
        return "refused" if "leave out --packing" in str(refusal) else str(refusal)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, VOCABULARY, (length,), generator=draw).tolist() for length in (5, 20, 7)]
    row = {"input_ids": [token for text in texts for token in text], "lengths": [len(text) for text in texts]}
    batch = PackingCollator(0, 40)([row])
    with torch.no_grad():
        packed = relation_qkv(attention_qkv(model, model_inputs(model, batch, is_causal(model))), batch)
        alone = [attention_qkv(model, {"input_ids": torch.tensor([text])}) for text in texts]
    for together, *parts in zip(packed, *alone, strict=True):
        torch.testing.assert_close(together, torch.cat(parts, dim=2), rtol=1e-4, atol=1e-4)
    return "yes"


def measured(family: str) -> Row:
    """Raises where something fails that every family shall do."""
    teacher = tiny_encoder(family)
    packing = packing_of(teacher)
    student = build_student(teacher, num_layers=2, hidden_size=16, seed=0)
    assert type(student) is type(teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(teacher, student, folder, steps=5)
        changed = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])]
        assert any(".0." in name for name in changed), "the first layer was not trained"
        trainer.save_model()
        loader = loads_with(student, folder)
        trained(tiny_encoder(family), build_student(teacher, num_layers=1, seed=0), folder, steps=1, bf16=True)
    on_command_line = loader == "AutoModel" and teacher.main_input_name in ("input_ids", "pixel_values")
    if family in ("videomae", "vivit"):
        on_command_line = False
        with pytest.raises(ValueError, match="takes films, and minilm-train reads texts and images"):
            check_no_films(teacher)
    error = max(own_attention_errors(teacher, tiny_inputs(teacher, (9, 9))))
    exact = error < 1e-5
    assert exact != (family in BESIDE), f"{family} differs from its own attention by {error:.1e}"
    return Row(
        attention="yes" if exact else f"but for its {BESIDE[family]}",
        student=loader,
        packing=packing,
        bf16="yes",
        command="yes" if on_command_line else "from Python",
    )


def table(rows: dict[str, Row]) -> str:
    """Families with equal rows on one line."""
    lines = [
        "| family | q kᵀ/√d is its attention | student, loads with | `--packing` | bf16 | `minilm-train` |",
        "|---|---|---|---|---|---|",
    ]
    for kind, families in KINDS.items():
        groups: dict[Row, list[str]] = {}
        for family, name in families.items():
            groups.setdefault(rows[family], []).append(name)
        lines += [f"| {kind}: {', '.join(names)} | {' | '.join(row)} |" for row, names in groups.items()]
    lines.append(f"| Not seen by `capture`: {', '.join(UNSUPPORTED.values())} | | | | | no |")
    return "\n".join(lines)


_rows: dict[str, Row] = {}


def row_of(family: str) -> Row:
    if family not in _rows:
        _rows[family] = measured(family)
    return _rows[family]


def written(readme: str, table: str) -> str:
    """README.md with the table in its place."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


@pytest.mark.parametrize("family", SUPPORTED)
def test_family(family: str) -> None:
    if not is_there(family):
        pytest.skip(f"this transformers has no {SUPPORTED[family]}")
    assert row_of(family).bf16 == "yes"


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_family_is_told_so_in_a_sentence(family: str) -> None:
    if not is_there(family):
        pytest.skip(f"this transformers has no {UNSUPPORTED[family]}")
    model = tiny_encoder(family)
    with pytest.raises(ValueError, match=r"AttentionInterface|by stage") as refusal:
        attention_qkv(build_student(model), probe_inputs(model))
    assert "\n" not in str(refusal.value)


def test_table_in_the_readme_is_what_was_measured() -> None:
    missing = [name for family, name in SUPPORTED.items() if not is_there(family)]
    if missing:
        pytest.skip(f"this transformers has no {', '.join(missing)}")
    readme = README.read_text(encoding="utf-8")
    fresh = written(readme, table({family: row_of(family) for family in SUPPORTED}))
    assert readme == fresh, "the families changed: python tests/test_families.py --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_families.py --write")
    now = written(README.read_text(encoding="utf-8"), table({family: measured(family) for family in SUPPORTED}))
    README.write_text(now, encoding="utf-8")
