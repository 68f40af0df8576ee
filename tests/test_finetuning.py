"""Fine-tuning: what the Trainer does against a plain loop, what each form learns, which head and which records."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model
from tiny_text import SPECIAL, lines, save_teacher, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from minilm.errors import NonFiniteError, UsageError
from minilm.evaluation.finetuning import _encode_words, _first_tokens, _subsample, finetune
from minilm.evaluation.fitting import fit, predict
from minilm.evaluation.settings import Settings
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.task_models import load_for_task
from minilm.evaluation.tasks import Form, Task

FAST = Settings(learning_rate=2e-3, epochs=4, batch_size=16, max_length=24, use_cpu=True)


@pytest.fixture(autouse=True)
def _no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def task_of(form: Form, columns: dict[str, list[Any]], classes: tuple[str, ...], *metrics: str) -> TaskData:
    """The last quarter is scored."""
    texts = tuple(name for name in columns if name != "label")
    records = Dataset.from_dict(columns)
    last = len(records) // 4 * 3
    split = {"validation": records.select(range(last, len(records)))}
    return TaskData(Task("tiny", form, texts, "label", metrics), records.select(range(last)), split, classes)


def words(count: int, letters: str, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(2, 4))) for _ in range(count)]


def by_letter(count: int = 160) -> TaskData:
    """Whether a text is of the first letters or of the last."""
    texts = [f"{word} {word[::-1]}" for half in ("abcd", "wxyz") for word in words(count, half)]
    order = np.random.default_rng(0).permutation(len(texts))
    columns = {"text": [texts[place] for place in order], "label": [int(place >= count) for place in order]}
    return task_of("classification", columns, ("first", "last"), "accuracy", "f1")


def test_the_trainer_does_what_a_plain_loop_does(tmp_path: Path) -> None:
    """AdamW with decay of the matrices alone, 10 % warm-up, linear decay, clipped gradients, means over the batch."""
    folder = save_teacher(tmp_path / "model", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    model, tokenizer = load_for_task(str(folder), AutoModelForSequenceClassification, 24, 0, num_labels=3)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    records = Dataset.from_dict(
        {**tokenizer(lines(40), truncation=True, max_length=24), "labels": [number % 3 for number in range(40)]}
    )
    batches: list[dict[str, torch.Tensor]] = []
    pad = DataCollatorWithPadding(tokenizer)

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batches.append(dict(pad(features)))
        return {key: tensor.clone() for key, tensor in batches[-1].items()}

    settings = Settings(learning_rate=1e-3, epochs=3, batch_size=16, use_cpu=True)
    fit(model, records, collate, settings, tmp_path / "run", "tiny", keep=lambda logits: logits)
    trained = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    model.load_state_dict(start)
    model.train()
    matrices = [weights for name, weights in model.named_parameters() if "LayerNorm" not in name and "bias" not in name]
    vectors = [weights for name, weights in model.named_parameters() if "LayerNorm" in name or "bias" in name]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert len(batches) == 9
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step if step < 1 else (9 - step) / 8)
        labels = batch.pop("labels")
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    moved = 0.0
    for key, weights in model.state_dict().items():
        # Biases of keys have a true gradient of 0, and what Adam makes of its rounding is chance.
        assert key.endswith("key.bias") or torch.allclose(weights, trained[key], atol=2e-6), key
        moved = max(moved, float((weights - start[key]).abs().max())) if weights.is_floating_point() else moved
    assert moved > 1e-3


def test_predictions_are_in_the_order_of_the_records(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "model")
    model, tokenizer = load_for_task(str(folder), AutoModelForSequenceClassification, 24, 0, num_labels=3)
    texts = lines(9)
    records = Dataset.from_dict({**tokenizer(texts), "labels": [0] * 9})
    settings = Settings(epochs=1, use_cpu=True)
    collate = DataCollatorWithPadding(tokenizer)
    trainer = fit(model, records, collate, settings, tmp_path / "run", "tiny", keep=lambda logits: logits)
    model.eval()
    alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(torch.tensor(predict(trainer, records)), alone, atol=1e-5)


def test_the_seed_decides_the_order_and_dropout(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "model")

    def trained(seed: int) -> torch.Tensor:
        model, tokenizer = load_for_task(str(folder), AutoModelForSequenceClassification, 24, 0, num_labels=3)
        records = Dataset.from_dict({**tokenizer(lines(24)), "labels": [0, 1, 2] * 8})
        collate = DataCollatorWithPadding(tokenizer)
        settings = Settings(epochs=1, batch_size=8, seed=seed, use_cpu=True)
        fit(model, records, collate, settings, tmp_path / "run", "tiny", keep=lambda logits: logits)
        return model.get_parameter("classifier.weight").detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_classes_of_texts_are_learnt_and_the_seed_decides(tmp_path: Path) -> None:
    folder, data = str(save_teacher(tmp_path / "model")), by_letter()
    found = finetune(folder, data, FAST, tmp_path / "run")
    assert found["validation"].keys() == {"accuracy", "f1"}
    assert found["validation"]["accuracy"] > 95
    assert not list((tmp_path / "run").iterdir())
    one_epoch = Settings(epochs=1, max_length=24, max_train_records=64, use_cpu=True)
    numbers = task_of("regression", {"text": data.train["text"][:], "label": data.train["label"][:]}, (), "pearson")
    first, again = (finetune(folder, numbers, one_epoch, tmp_path / "run") for _ in range(2))
    assert first == again
    assert first != finetune(folder, numbers, replace(one_epoch, seed=1), tmp_path / "run")


def test_numbers_of_pairs_are_learnt(tmp_path: Path) -> None:
    first, second = words(240, "abwx"), words(240, "abwx", 1)
    amounts = [float(sum(map(one.count, "ab")) - sum(map(one.count, "wx"))) for one in second]
    data = task_of("regression", {"one": first, "two": second, "label": amounts}, (), "spearman", "pearson")
    found = finetune(str(save_teacher(tmp_path / "model")), data, FAST, tmp_path / "run")
    assert found["validation"]["spearman"] > 50


def test_classes_of_words_are_learnt(tmp_path: Path) -> None:
    texts = [words(4, "abwx", seed) for seed in range(200)]
    labels = [[int(word[0] in "ab") for word in text] for text in texts]
    data = task_of("tokens", {"words": texts, "label": labels}, ("O", "B-X"), "entity_f1", "accuracy")
    found = finetune(str(save_teacher(tmp_path / "model")), data, FAST, tmp_path / "run")
    assert found["validation"]["entity_f1"] > 95


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "modernbert", "gpt2", "llama"])
def test_families_have_a_head_of_each_kind(tmp_path: Path, family: str) -> None:
    folder = str(save_teacher(tmp_path / "model", family))
    texts = words(24, "abwx")
    settings = Settings(epochs=1, batch_size=8, max_length=24, use_cpu=True)
    classes = task_of("classification", {"text": texts, "label": [0, 1, 2] * 8}, ("a", "b", "c"), "accuracy")
    tags = task_of("tokens", {"words": [[text, "w"] for text in texts], "label": [[0, 1]] * 24}, ("O", "B"), "accuracy")
    for data in (classes, tags):
        assert 0 <= finetune(folder, data, settings, tmp_path / "run")["validation"]["accuracy"] <= 100


def test_a_decoder_without_padding_token_pads_with_the_texts_end(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)

    def load(**special: str) -> Any:
        PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **special).save_pretrained(
            tmp_path
        )
        return load_for_task(str(tmp_path), AutoModelForSequenceClassification, 24, 0, num_labels=2)

    model, tokenizer = load(eos_token="[SEP]")
    assert tokenizer.pad_token == "[SEP]"
    assert model.config.pad_token_id == tokenizer.convert_tokens_to_ids("[SEP]")
    with pytest.raises(UsageError, match="no padding token and no end-of-text token"):
        load(unk_token="[UNK]")


@pytest.mark.parametrize("labels", [3, 2])
def test_the_head_of_a_classifier_is_not_taken_over(tmp_path: Path, labels: int) -> None:
    """Whether its size fits or not; the body is."""
    saved = tiny_model("bert", "ForSequenceClassification", num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def load(seed: int) -> Any:
        return load_for_task(str(tmp_path), AutoModelForSequenceClassification, 24, seed, num_labels=labels)[0]

    model = load(0)
    assert torch.equal(model.bert.encoder.layer[3].output.dense.weight, saved.bert.encoder.layer[3].output.dense.weight)
    assert model.classifier.weight.shape == (labels, 32)
    assert model.classifier.weight.std() < 0.05  # the saved one's is 0.2
    assert torch.equal(model.classifier.weight, load(0).classifier.weight)
    assert not torch.equal(model.classifier.weight, load(1).classifier.weight)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    settings = Settings(learning_rate=1e30, epochs=2, batch_size=16, max_length=24, use_cpu=True)
    with pytest.raises(NonFiniteError, match=r"model on tiny: the loss is nan by step \d+, learning rate 1e\+30"):
        finetune(str(save_teacher(tmp_path / "model")), by_letter(), settings, tmp_path / "run")


def test_what_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    folder, data = str(save_teacher(tmp_path / "model")), by_letter()
    with pytest.raises(UsageError, match="max_length 128 is more than the model's 64 positions"):
        finetune(folder, data, Settings(use_cpu=True), tmp_path / "run")
    empty = TaskData(data.task, data.train.select([]), data.evaluated, data.classes)
    with pytest.raises(UsageError, match="'tiny' has no training split"):
        finetune(folder, empty, FAST, tmp_path / "run")
    with pytest.raises(UsageError, match=r"cannot load the model '.*nowhere'"):
        finetune(str(tmp_path / "nowhere"), data, FAST, tmp_path / "run")


def byte_level(prefix_space: bool) -> PreTrainedTokenizerFast:
    """Bytes, of which a space belongs to the word behind it."""
    pieces = [*SPECIAL, *pre_tokenizers.ByteLevel.alphabet(), "Ġa", "bc"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), byte_level(True), byte_level(False)])
def test_the_first_token_of_a_word_has_its_label(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [["abc", "a", "bcbc", "", "c"], ["c"]]
    found = _encode_words(tokenizer, texts, [[3, 4, 5, 6, 7], [8]], 64)
    for row, text in enumerate(texts):
        ids = found.records["input_ids"][row]
        joined = " ".join(text)
        for place, first in enumerate(found.first_tokens[row]):
            if not text[place]:
                assert first is None
                continue
            start = len(" ".join([*text[:place], ""]))
            ((begin, end),) = [tokenizer(joined, return_offsets_mapping=True)["offset_mapping"][first]]
            assert start - 1 <= begin <= start < end, (ids, place)
            assert found.records["labels"][row][first] == [[3, 4, 5, 6, 7], [8]][row][place]
    labelled = [[label for label in row if label != -100] for row in found.records["labels"]]
    assert labelled == [[3, 4, 5, 7], [8]]


def test_a_token_of_two_words_is_the_first_ones() -> None:
    assert _first_tokens(["new", "york", "is"], [(0, 0), (0, 8), (9, 11), (0, 0)]) == [1, None, 2]


def test_words_that_are_cut_off_are_outside(tmp_path: Path) -> None:
    found = _encode_words(tiny_tokenizer(), [["ab", "c", "d"]], [[1, 1, 1]], 5)  # [CLS] a ##b c [SEP]
    assert found.first_tokens == [[1, 3, None]]
    assert found.records["labels"][0] == [-100, 1, -100, 1, -100]
    data = task_of("tokens", {"words": [["a"] * 9] * 8, "label": [[1] * 9] * 8}, ("O", "B"), "accuracy")
    settings = Settings(learning_rate=1e-2, epochs=8, batch_size=2, max_length=5, use_cpu=True)
    folder = str(save_teacher(tmp_path / "model"))
    assert finetune(folder, data, settings, tmp_path / "run")["validation"]["accuracy"] == pytest.approx(100 * 3 / 9)


def test_a_sample_keeps_the_shares_of_classes_and_sizes() -> None:
    labels = [0] * 100 + [1] * 20 + [2] * 80
    data = task_of("classification", {"text": lines(200), "label": labels}, ("a", "b", "c"), "accuracy")
    whole = TaskData(data.task, Dataset.from_dict({"text": lines(200), "label": labels}), data.evaluated, data.classes)
    taken = _subsample(whole, 50, seed=0)
    assert np.bincount(taken["label"][:]).tolist() == [25, 5, 20]
    assert taken["text"][:] == _subsample(whole, 50, seed=0)["text"][:]
    assert taken["text"][:] != _subsample(whole, 50, seed=1)["text"][:]
    assert len(_subsample(whole, 500, seed=0)) == len(_subsample(whole, None, seed=0)) == 200
    amounts = TaskData(
        Task("tiny", "regression", ("text",), "label", ("pearson",)),
        Dataset.from_dict({"text": lines(200), "label": [float(number) for number in range(200)]}),
        {},
        (),
    )
    sizes = np.array(_subsample(amounts, 50, seed=0)["label"][:])
    assert sorted(sizes // 4) == list(range(50))
