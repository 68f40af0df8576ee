"""Sentence encoders by the command line: what is trained, what stands in the folder, and what loads it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from safetensors.torch import load_file
from test_serving import add_sentence_files
from tiny_text import lines, write_lines
from transformers import AutoModel, AutoTokenizer

from minilm.cli.demo import teacher_folder
from minilm.models.agreement import Agreement
from minilm.models.embeddings import sentence_files
from minilm.models.sentence_modules import Dense, Normalize, SentenceHead, read_head, write_head

RUN = [
    *("--student_num_layers", "2", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "2", "--use_cpu"),
    *("--max_length", "24", "--disable_tqdm", "true", "--learning_rate", "0.01", "--per_device_train_batch_size", "4"),
]
TEXTS = lines(5, seed=3)


def distil(command: CommandLine, teacher: str, output: str, *flags: str) -> dict[str, Any]:
    data = str(write_lines(Path("texts.txt"), 80))
    code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", output, *RUN, *flags)
    assert code == 0, err
    metrics: dict[str, Any] = json.loads(Path(output, "metrics.json").read_text())
    return metrics


def own_vectors(folder: str) -> torch.Tensor:
    """Of TEXTS, by `AutoModel` and what the folder's files say of the rest."""
    files = sentence_files(folder)
    assert files is not None
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return read_head(files)(AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state, inputs)


def encoded(folder: str) -> torch.Tensor:
    """Of TEXTS, by sentence-transformers, which the demonstration's teacher brings along."""
    from sentence_transformers import SentenceTransformer

    return torch.tensor(SentenceTransformer(folder, device="cpu").encode(TEXTS))


def test_the_embedding_alone_trains_the_whole_student(command: CommandLine, teacher: str) -> None:
    metrics = distil(command, teacher, "out", "--objective", "embedding")
    assert metrics["parts"] == {"embedding": 1.0}
    ends = metrics["heldout"]["embedding"]
    assert ends["end"] < 0.9 * ends["start"]
    assert metrics["serves"]
    assert metrics["agreement"]["end"]["correlation"] > metrics["agreement"]["start"]["correlation"]
    log = json.loads(Path("out/checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert all("embedding" in row for row in log if "loss" in row)
    report = Path("out/report.md").read_text("utf-8")
    assert "The whole student was trained, up to what it returns" in report
    assert "SentenceTransformer('out')" in report
    before = AutoModel.from_pretrained(teacher, num_hidden_layers=2).state_dict()
    after = AutoModel.from_pretrained("out").state_dict()
    assert not torch.equal(after["encoder.layer.1.output.dense.weight"], before["encoder.layer.1.output.dense.weight"])
    assert (own_vectors("out") - encoded("out")).abs().max() < 1e-6


def test_a_narrower_student_gets_a_dense_layer_and_goes_on_bitwise(
    command: CommandLine, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sentence_files(teacher, "cls")
    length = '{"max_seq_length": 60, "do_lower_case": false}'
    Path(teacher, "sentence_roberta_config.json").write_text(length)
    flags = ["--student_hidden_size", "16", "--embedding_weight", "0.5", "--student_embedding_dim", "24"]
    heads: list[dict[str, torch.Tensor]] = []
    similarities = Agreement.similarities

    def noted(self: Agreement, model: torch.nn.Module, head: SentenceHead) -> torch.Tensor:
        heads.append({name: x.clone() for name, x in head.state_dict().items()})
        return similarities(self, model, head)

    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "similarities", noted)
        metrics = distil(command, teacher, "out", *flags)
    of_teacher, untrained, trained = heads
    assert not of_teacher
    assert not torch.equal(untrained["further.0.weight"], trained["further.0.weight"])
    assert torch.equal(trained["further.0.weight"], load_file(Path("out/2_Dense/model.safetensors"))["linear.weight"])
    assert metrics["parts"] == {"qk": 1.0, "vv": 1.0, "embedding": 0.5}
    assert metrics["pooling"] == ["cls"]
    shutil.copytree("out/checkpoint-2", "again/checkpoint-2")
    distil(command, teacher, "again", *flags, "--resume_from_checkpoint", "auto")
    for name in ("model.safetensors", "2_Dense/model.safetensors", "1_Pooling/config.json", "modules.json"):
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()
    assert (
        Path("out/2_Dense/model.safetensors").read_bytes()
        != Path("out/checkpoint-2/2_Dense/model.safetensors").read_bytes()
    )
    assert Path("out/sentence_roberta_config.json").read_text() == length
    assert not Path("out/sentence_bert_config.json").exists()  # which would be read first
    more = ["--objective", "embedding", "--student_embedding_dim", "24", "--learning_rate", "1e-12", "--seed", "7"]
    again = ["--teacher", teacher, "--data", "texts.txt", "--student", "out", "--output_dir", "more", *RUN[2:], *more]
    assert command(*again)[0] == 0
    first, second = (load_file(f"{folder}/2_Dense/model.safetensors")["linear.weight"] for folder in ("out", "more"))
    torch.testing.assert_close(second, first)
    vectors = encoded("out")
    assert vectors.shape == (5, 24)
    assert (own_vectors("out") - vectors).abs().max() < 1e-6


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_packed_texts_and_a_pooling_of_ones_own(command: CommandLine, teacher: str, pooling: str) -> None:
    flags = ["--objective", "embedding", "--packing", "--pooling", pooling, "--embedding_loss", "mse"]
    metrics = distil(command, teacher, "out", *flags)
    assert metrics["pooling"] == [pooling]
    assert metrics["heldout"]["embedding"]["end"] < metrics["heldout"]["embedding"]["start"]
    assert json.loads(Path("out/1_Pooling/config.json").read_text())["pooling_mode"] == pooling


def test_other_sentence_modules_are_another_run(command: CommandLine, teacher: str) -> None:
    def write(value: float, activation: torch.nn.Module) -> None:
        dense = Dense(32, 8, activation=activation)
        torch.nn.init.constant_(dense.weight, value)
        torch.nn.init.zeros_(dense.bias)
        head = SentenceHead(["mean"], [dense, Normalize()])
        write_head(Path(teacher), head, 32, head.state_dict(), None)

    write(0.1, torch.nn.Tanh())
    distil(command, teacher, "out", "--objective", "embedding")
    resumed = ["--objective", "embedding", "--resume_from_checkpoint", "out/checkpoint-2"]
    run = ["--teacher", teacher, "--data", "texts.txt", "--output_dir", "again", *RUN, *resumed]
    for change, told in (
        ((0.2, torch.nn.Tanh()), "its hash of the teacher's sentence modules is "),
        ((0.1, torch.nn.GELU()), "its sentence_modules is ['Dense', 'Tanh', 'Normalize'], this run's is ['D"),
    ):
        write(*change)
        code, _, err = command(*run)
        assert (code, err.count("\n")) == (2, 1)
        assert f"belongs to another run: {told}" in err


def test_flags_that_mean_nothing_are_refused(command: CommandLine, teacher: str, data: str) -> None:
    def told(*flags: str) -> str:
        code, _, err = command("--teacher", teacher, "--data", data, "--output_dir", "out", *RUN, *flags)
        assert code == 2
        assert err.count("\n") == 1
        return err

    assert "--pooling cls is given and --embedding_weight is 0: give it a weight" in told("--pooling", "cls")
    assert "--student_embedding_dim 8 is given and" in told("--student_embedding_dim", "8")
    assert "--relations qk means nothing to --objective embedding" in told(
        "--objective", "embedding", "--relations", "qk"
    )
    alone = ["--objective", "embedding", "--embedding_weight", "0"]
    assert "at least one term, it has 0" in told(*alone)
    assert "has no output loss without --output_weight" in told("--output_temperature", "3")
    assert "--student_embedding_dim is 0: it must be at least 1" in told("--student_embedding_dim", "0")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, SentenceHead]:
    """The demonstration's teacher with dense layers, as sentence-transformers saves it; and as it is written here."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense as TheirDense
    from sentence_transformers.base.modules import Normalize as TheirNormalize
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [TheirDense(768, 20, bias=False), TheirDense(20, 12, activation_function=torch.nn.GELU())]
    pooling = Pooling(384, ["mean", "max"], include_prompt=False)
    whole = [Transformer(str(teacher_folder())), pooling, *modules, TheirNormalize()]
    SentenceTransformer(modules=whole, device="cpu").save_pretrained(str(tmp_path / "theirs"))
    files = sentence_files(str(tmp_path / "theirs"))
    assert files is not None
    return tmp_path / "theirs", read_head(files)


def test_dense_layers_are_read_and_written_as_sentence_transformers_does(saved: tuple[Path, SentenceHead]) -> None:
    folder, head = saved
    assert [type(module) for module in head.further] == [Dense, Dense, Normalize]
    vectors = encoded(str(folder))
    assert (own_vectors(str(folder)) - vectors).abs().max() < 1e-6
    files = sentence_files(str(folder))
    shutil.copytree(folder, folder.parent / "ours", ignore=shutil.ignore_patterns("[1-9]_*", "modules.json", "*sent*"))
    write_head(folder.parent / "ours", head, 384, head.state_dict(), files)
    assert torch.equal(encoded(str(folder.parent / "ours")), vectors)
    for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        assert json.loads((folder.parent / "ours" / name).read_text()) == json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"activation_function": "os.system"}, "the activation_function 'os.system', which is no class of torch.nn"),
        ({"use_residual": True}, r"2_Dense is not activation\(W x \+ b\) of the sentence's vector"),
        (
            {"type": "sentence_transformers.models.LSTM"},
            "modules are Transformer -> Pooling -> LSTM -> Dense -> Normal",
        ),
    ],
)
def test_modules_that_are_not_known_are_refused(
    saved: tuple[Path, SentenceHead], change: dict[str, Any], told: str
) -> None:
    folder, _ = saved
    path = folder / ("modules.json" if "type" in change else "2_Dense/config.json")
    content = json.loads(path.read_text())
    (content[2] if "type" in change else content).update(change)
    path.write_text(json.dumps(content))
    files = sentence_files(str(folder))
    assert files is not None
    with pytest.raises(ValueError, match=told):
        read_head(files)
