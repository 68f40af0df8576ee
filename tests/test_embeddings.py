"""Sentence vectors: pooling as sentence-transformers pools, and a student's folder that it loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from minilm.cli.demo import teacher_folder
from minilm.models.embeddings import POOLINGS, pool, sentence_files

MASKS = {"right": [[1, 1, 1, 1], [1, 1, 0, 0]], "left": [[1, 1, 1, 1], [0, 0, 1, 1]]}
TEXTS = ["A sentence.", "And another, rather longer one, with more words in it.", "x"]


@pytest.fixture
def teacher_with_files(tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher_folder(), tmp_path / "teacher"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_is_that_of_sentence_transformers(name: str, padding: str) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    hidden = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(MASKS[padding])
    expected = modules.Pooling(8, name)({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pool(hidden, mask, [name]), expected)
    behind = hidden.masked_fill(~mask.bool().unsqueeze(2), torch.nan)
    torch.testing.assert_close(pool(behind, mask, [name]), expected)


def test_several_poolings_are_concatenated() -> None:
    hidden, mask = torch.randn(2, 4, 8), torch.ones(2, 4)
    both = pool(hidden, mask, ["mean", "cls"])
    torch.testing.assert_close(both, torch.cat([hidden.mean(1), hidden[:, 0]], dim=1))


def test_the_demonstrations_teacher_pools_by_the_mean() -> None:
    files = sentence_files(str(teacher_folder()))
    assert files is not None
    assert files.pooling == ("mean",)
    assert set(files.files) == {
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    }


def test_a_teacher_without_the_files_has_none(teacher: str) -> None:
    assert sentence_files(teacher) is None


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, ("lasttoken",)),
        ({"pooling_mode_mean_tokens": False}, ("mean",)),
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["max", "mean"]}, ("max", "mean")),
    ],
)
def test_both_ways_of_naming_the_pooling_are_read(
    teacher_with_files: Path, config: dict[str, object], pooling: tuple[str, ...]
) -> None:
    edit(teacher_with_files / "1_Pooling" / "config.json", **config)
    files = sentence_files(str(teacher_with_files))
    assert files is not None
    assert files.pooling == pooling


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "pooling 'median' is none of cls, max, mean"),
        ("1_Pooling/config.json", "{", "Expecting property name"),
        ("modules.json", '[{"path": ""}]', "KeyError: 'type'"),
    ],
)
def test_files_that_say_nothing_intelligible_are_one_sentence(
    teacher_with_files: Path, name: str, content: str, told: str
) -> None:
    (teacher_with_files / name).write_text(content)
    with pytest.raises(ValueError, match=f"cannot read the sentence-transformers modules in .*{told}"):
        sentence_files(str(teacher_with_files))


def test_no_module_is_copied_from_elsewhere(teacher_with_files: Path) -> None:
    modules = json.loads((teacher_with_files / "modules.json").read_text())
    modules[2]["path"] = "../secrets"
    (teacher_with_files / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"'\.\./secrets' leads out of the folder"):
        sentence_files(str(teacher_with_files))


def test_modules_of_other_packages_are_left_where_they_are(teacher_with_files: Path) -> None:
    modules = json.loads((teacher_with_files / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (teacher_with_files / "modules.json").write_text(json.dumps(modules))
    assert sentence_files(str(teacher_with_files)) is None


def test_a_transformer_in_a_folder_of_its_own_has_them_one_level_up(teacher_with_files: Path, tmp_path: Path) -> None:
    own = teacher_with_files / "0_Transformer"
    own.mkdir()
    for path in list(teacher_with_files.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(own / path.name)
    modules = json.loads((teacher_with_files / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (teacher_with_files / "modules.json").write_text(json.dumps(modules))

    files = sentence_files(str(own))
    assert files is not None
    files.copy_to(tmp_path)
    assert json.loads((tmp_path / "modules.json").read_text())[0]["path"] == ""
    assert (tmp_path / "sentence_bert_config.json").read_bytes() == (own / "sentence_bert_config.json").read_bytes()
    assert (tmp_path / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "0_Transformer").exists()


def test_sentence_transformers_encodes_as_the_model_with_that_pooling(teacher_with_files: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    edit(teacher_with_files / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    files = sentence_files(str(teacher_with_files))
    assert files is not None
    student = teacher_with_files.parent / "student"
    model = AutoModel.from_pretrained(teacher_with_files, num_hidden_layers=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher_with_files)
    for part in (model, tokenizer):
        part.save_pretrained(student)
    files.copy_to(student)

    loaded = st.SentenceTransformer(str(student), device="cpu")
    assert loaded.max_seq_length == 256
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = pool(model(**inputs).last_hidden_state, inputs["attention_mask"], files.pooling)
    assert (torch.tensor(loaded.encode(TEXTS)) - functional.normalize(vectors, dim=1)).abs().max() < 1e-6
