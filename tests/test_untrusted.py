"""No code of a model folder, a checkpoint or data is run: what would write the canary is refused in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CommandLine
from hostile_inputs import CANARY, Pickled
from safetensors.torch import load_file
from tiny_tasks import write_glue
from tiny_text import save_teacher, write_lines

from minilm.cli import augment, evaluate
from minilm.training.manifests import MANIFEST, read_manifest, write_manifest

RUN = ["--student_num_layers", "1", "--max_steps", "2", "--max_length", "12", "--disable_tqdm", "true", "--use_cpu"]
ALONE = [*RUN[2:], "--dry_run"]


def ending(command: CommandLine, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and stderr of the command that `argv` begins with."""
    if argv[0] == "minilm-train":
        code, _, err = command(*argv[1:])
        return code, err
    capsys.readouterr()
    code = (evaluate if argv[0] == "minilm-eval" else augment).main(argv[1:])
    return code, capsys.readouterr().err


def calls(model: str, good: str, data: str) -> list[list[str]]:
    """Every place where a command loads a model."""
    trained = ["minilm-train", "--data", data, "--output_dir", "out"]
    write_glue(Path("tasks"))
    return [
        [*trained, "--teacher", model, *RUN, "--dry_run"],
        [*trained, "--teacher", good, "--student", model, *ALONE],
        ["minilm-eval", model, "--data_dir", "tasks", "--tasks", "sst2", "--output_dir", "out"],
        [
            "minilm-augment",
            "tasks/stsb/train.jsonl",
            "--text_column",
            "sentence1",
            "--teacher",
            model,
            "--output",
            "x.jsonl",
        ],
    ]


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(content | values), encoding="utf-8")


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    """A model folder with code beside it, which writes the canary."""
    folder = save_teacher(tmp_path / "custom")
    (folder / "custom.py").write_text(
        f"open({str(tmp_path / CANARY)!r}, 'w').close()\n"
        "from transformers import BertConfig as Config, BertModel as Model, PreTrainedTokenizerFast as Tokenizer\n"
    )
    return folder


def test_custom_code_of_a_model_is_never_run(
    command: CommandLine, capsys: pytest.CaptureFixture[str], custom: Path, teacher: str, data: str
) -> None:
    change(
        custom / "config.json",
        model_type="custom",
        auto_map={"AutoConfig": "custom.Config", "AutoModel": "custom.Model", "AutoModelForMaskedLM": "custom.Model"},
    )
    for argv in calls(str(custom), teacher, data):
        code, err = ending(command, capsys, *argv)
        assert (code, err.count("\n")) == (2, 1), err
        assert "its model is custom code (model_type 'custom'), which is never run" in err
    assert not (custom.parent / CANARY).exists()


def test_custom_code_of_a_known_model_or_its_tokenizer_is_passed_over(
    command: CommandLine, custom: Path, data: str
) -> None:
    """transformers has the classes itself."""
    change(custom / "config.json", auto_map={"AutoConfig": "custom.Config", "AutoModel": "custom.Model"})
    change(custom / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "custom.Tokenizer"]})
    code, _, err = command("--teacher", str(custom), "--data", data, "--output_dir", "out", *RUN, "--dry_run")
    assert code == 0, err
    assert not (custom.parent / CANARY).exists()


def test_custom_modules_of_sentence_transformers_are_never_run(
    command: CommandLine, capsys: pytest.CaptureFixture[str], custom: Path, teacher: str, data: str
) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "custom.Model"}]
    (custom / "modules.json").write_text(json.dumps(modules))
    code, err = ending(command, capsys, *calls(str(custom), teacher, data)[2])
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot load the model" in err
    code, err = ending(command, capsys, *calls(str(custom), teacher, data)[0])
    assert code == 0, err  # whose Transformer is read as it is
    assert not (custom.parent / CANARY).exists()


def test_pickled_weights_are_read_as_weights_alone(
    command: CommandLine, capsys: pytest.CaptureFixture[str], custom: Path, teacher: str, data: str
) -> None:
    state = load_file(custom / "model.safetensors")
    (custom / "model.safetensors").unlink()
    torch.save(state | {"more": Pickled(custom.parent)}, custom / "pytorch_model.bin")
    for argv in calls(str(custom), teacher, data)[:3]:
        code, err = ending(command, capsys, *argv)
        assert (code, err.count("\n")) == (2, 1), err
        assert "pytorch_model.bin runs code when it is read, which is never done" in err
    assert not (custom.parent / CANARY).exists()

    torch.save(state, custom / "pytorch_model.bin")
    code, err = ending(command, capsys, *calls(str(custom), teacher, data)[0])
    assert code == 0, err


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_would_run_code_is_refused(
    command: CommandLine, teacher: str, name: str, tmp_path: Path
) -> None:
    data = str(write_lines(tmp_path / "lines.txt", 8))
    argv = ["--teacher", teacher, "--data", data, "--output_dir", "out", *RUN, "--save_steps", "1"]
    assert command(*argv)[0] == 0
    for done in ("metrics.json", "checkpoint-2/manifest.json"):
        assert Path("out", done).exists()
    Path("out/metrics.json").unlink()
    checkpoint = Path("out/checkpoint-2")
    torch.save({"state": Pickled(tmp_path)}, checkpoint / name)
    resumable = read_manifest(checkpoint / MANIFEST)["resumable"]
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, resumable=resumable)  # as who means harm would
    code, _, err = command(*argv, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    assert not (tmp_path / CANARY).exists()
    assert code == 1
    told = "cannot continue from out/checkpoint-2: one of its files would run code when it is read"
    assert told in err.splitlines()[-1]
    assert "Traceback" not in err
