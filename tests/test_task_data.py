"""Tasks are read from any kind of file, or from the hub, with their labels as numbers; faults are one sentence."""

import gzip
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_tasks import pairs, sentences, write_glue, write_split

from minilm.errors import UsageError
from minilm.evaluation.own_tasks import Columns, find_task, own_task, task_folders
from minilm.evaluation.task_data import TaskData, read_task
from minilm.evaluation.tasks import TASKS, Task

SST2 = TASKS["sst2"]


@pytest.fixture(autouse=True)
def no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def told(data: TaskData) -> Any:
    return data.train.to_list(), {name: split.to_list() for name, split in data.evaluated.items()}, data.classes


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json", "csv.gz"])
@pytest.mark.parametrize("validation", ["validation", "dev"])
def test_all_kinds_of_files_hold_the_same(kind: str, validation: str, tmp_path: Path) -> None:
    records = [*sentences(6), {"sentence": 'NA, "quoted"\nand\tmore', "label": 1}]
    for split in ("train", validation):
        path = write_split(tmp_path / "sst2", f"{split}.{kind.removesuffix('.gz')}", records)
        if kind.endswith("gz"):
            path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    assert told(read_task(SST2, tmp_path)) == (records, {"validation": records}, ("0", "1"))


def test_a_split_may_come_in_parts_and_not_twice(tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    for part in range(2):
        write_split(folder, f"train-0000{part}-of-00002.parquet", sentences(4, 4 * part))
    write_split(folder, "validation.parquet", sentences(3))
    assert read_task(SST2, tmp_path).train.to_list() == sentences(8)
    write_split(folder, "valid.csv", sentences(3))
    with pytest.raises(UsageError, match=r"the split 'validation' twice, as valid.csv and validation.parquet"):
        read_task(SST2, tmp_path)


def test_classes_keep_their_names_and_text_is_numbered_in_order(tmp_path: Path) -> None:
    assert read_task(SST2, write_glue(tmp_path)).classes == ("negative", "positive")
    for split in ("train", "validation"):
        write_split(
            tmp_path / "mine", f"{split}.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": "maybe"}]
        )
        write_split(tmp_path / "stars", f"{split}.csv", [{"text": "a", "label": 5}, {"text": "b", "label": -1}])
    mine, stars = (read_task(own_task(name, tmp_path / name, Columns()), tmp_path) for name in ("mine", "stars"))
    assert (mine.classes, mine.train["label"][:]) == (("maybe", "no"), [1, 0])
    assert (stars.classes, stars.train["label"][:]) == (("-1", "5"), [1, 0])


def test_without_validation_a_labelled_test_split_is_scored(tmp_path: Path) -> None:
    write_split(tmp_path / "sst2", "train.jsonl", sentences(4))
    write_split(tmp_path / "sst2", "test.jsonl", sentences(2))
    assert list(read_task(SST2, tmp_path).evaluated) == ["test"]


def test_without_training_records_the_scored_ones_are_there(tmp_path: Path) -> None:
    write_split(tmp_path / "sst2", "validation.jsonl", sentences(2))
    data = read_task(SST2, tmp_path)
    assert (len(data.train), data.train.column_names) == (0, ["sentence", "label"])
    assert len(data.evaluated["validation"]) == 2


NO_LABEL = [{"sentence": "a", "label": -1}, {"sentence": "b", "label": -1}]


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        ({"train": sentences(2), "validation": NO_LABEL}, r"the labels of the split 'validation' of .* are hidden"),
        (
            {"train": sentences(2), "test": NO_LABEL},
            r"no validation split and no labelled test split .* are test, train",
        ),
        ({"train": sentences(2)}, r"no validation split and no labelled test split to score 'sst2' on.* are train$"),
        (
            {"train": sentences(1), "validation": sentences(2)},
            r"'validation' of .* has the label 1, which no record of",
        ),
        ({"train": [{"text": "a", "label": 0}], "validation": []}, r"reads the column 'sentence', which the split 't"),
        ({"train": sentences(2), "validation": [{"sentence": None, "label": 1}]}, r"None, not text, .* of record 1$"),
        (
            {"train": sentences(2), "validation": [{"sentence": 3, "label": 1}]},
            r"3, not text, in the column 'sentence'",
        ),
        (
            {"train": sentences(2), "validation": [{"sentence": "a", "label": None}, *sentences(1)]},
            r"record 1 of .* no",
        ),
        ({"train": sentences(2), "validation": [{"sentence": "a", "label": 0.5}]}, r"0.5, which is no class: text or"),
    ],
)
def test_faults_of_the_data_are_one_sentence(splits: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    for name, records in splits.items():
        write_split(tmp_path / "sst2", f"{name}.jsonl", records)
    with pytest.raises(UsageError, match=sentence):
        read_task(SST2, tmp_path)


def test_an_amount_is_a_number(tmp_path: Path) -> None:
    write_split(tmp_path / "stsb", "train.jsonl", pairs(3))
    write_split(tmp_path / "stsb", "validation.jsonl", [{**pairs(1)[0], "label": "high"}])
    with pytest.raises(UsageError, match=r"record 1 .* has the label 'high', which is no number"):
        read_task(TASKS["stsb"], tmp_path)


def test_words_have_a_label_each(tmp_path: Path) -> None:
    records = [{"tokens": ["a", "b"], "label": ["B-x", "O"]}, {"tokens": ["c"], "label": ["O"]}]
    write_split(tmp_path / "ner", "train.jsonl", records)
    path = write_split(tmp_path / "ner", "validation.jsonl", records)
    task = own_task("ner", tmp_path / "ner", Columns())
    assert task == Task("ner", "tokens", ("tokens",), "label", ("entity_f1",))
    data = read_task(task, tmp_path)
    assert (data.classes, data.train["label"][:]) == (("B-x", "O"), [[0, 1], [1]])
    write_split(path.parent, path.name, [{"tokens": ["c", "d"], "label": ["O"]}, *records])
    with pytest.raises(UsageError, match=r"record 1 of .* has 2 words and, as labels, \['O'\]"):
        read_task(task, tmp_path)


def test_the_hub_is_asked_where_no_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str | None) -> Any:
        asked.append(names)
        split = datasets.Dataset.from_list(sentences(2))
        return datasets.DatasetDict(train=split, validation=split, test=datasets.Dataset.from_list(NO_LABEL))

    monkeypatch.setattr("minilm.evaluation.task_data.load_dataset", load_dataset)
    assert list(read_task(SST2, None).evaluated) == ["validation"]
    assert asked == [("nyu-mll/glue", "sst2")]
    with pytest.raises(UsageError, match="the task 'trec' is read from files: say with --data_dir where its folder is"):
        read_task(TASKS["trec"], None)


def test_a_hub_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"cannot get nyu-mll/glue \(sst2\) from the hub .*: say with --data_dir"):
        read_task(SST2, None)


def test_the_fingerprint_is_of_all_that_is_read(tmp_path: Path) -> None:
    def fingerprint(train: Any, **more: Any) -> str:
        write_split(tmp_path / "sst2", "train.jsonl", train)
        write_split(tmp_path / "sst2", "validation.jsonl", [{**record, **more} for record in sentences(2)])
        return read_task(SST2, tmp_path).fingerprint

    first = fingerprint(sentences(4))
    assert fingerprint(sentences(4), idx=3) == first
    others = [sentences(5), sentences(4)[::-1], [*sentences(3), {"sentence": "a", "label": 1}]]
    others.append([*sentences(3), {**sentences(4)[3], "label": 0}])
    assert len({first, *map(fingerprint, others)}) == 5


def test_training_records_are_drawn_from_the_seed(tmp_path: Path) -> None:
    data = read_task(SST2, write_glue(tmp_path))
    some = data.with_train_records(10, seed=0)
    texts = some.train["sentence"][:]
    assert len(set(texts)) == 10
    assert texts == [text for text in data.train["sentence"] if text in texts]  # in their order
    assert some.evaluated == data.evaluated
    assert data.with_train_records(10, seed=0).train["sentence"][:] == texts
    assert data.with_train_records(10, seed=1).train["sentence"][:] != texts
    assert data.with_train_records(24, seed=0) is data


@pytest.mark.parametrize(
    ("record", "columns", "form", "texts"),
    [
        ({"text": "a", "label": 1}, Columns(), "classification", ["text"]),
        ({"id": "7", "body": "a", "label": True}, Columns(("body",)), "classification", ["body"]),
        ({"title": "a", "label": "x"}, Columns(), "classification", ["title"]),
        ({"idx": 3, "title": "a", "label": 0.5}, Columns(), "regression", ["title"]),
        ({"premise": "a", "hypothesis": "b", "label": 1}, Columns(), "classification", ["premise", "hypothesis"]),
        ({"text": "a", "stars": 4}, Columns(None, "stars", "regression"), "regression", ["text"]),
        ({"tokens": ["a"], "label": [1]}, Columns(), "tokens", ["tokens"]),
    ],
)
def test_what_a_folder_of_ones_own_asks(
    record: Any, columns: Columns, form: str, texts: list[str], tmp_path: Path
) -> None:
    write_split(tmp_path / "mine", "train.parquet", [record])
    write_split(tmp_path / "mine", "test.parquet", [record])
    task = own_task("mine", tmp_path / "mine", columns)
    assert (task.form, list(task.texts), task.label) == (form, texts, columns.label or "label")
    assert task.metrics[0] == ("spearman" if form == "regression" else "accuracy")
    assert task.evaluated == ("test",)


@pytest.mark.parametrize(
    ("record", "columns", "sentence"),
    [
        ({"text": "a"}, Columns(), r"has no column 'label': choose with --label_column from \['text'\]"),
        ({"text": "a", "label": 1}, Columns(("body",)), r"has no column 'body': choose with --text_columns from \['te"),
        ({"id": "7", "body": "a", "label": 1}, Columns(), r"which columns of .* are read is not plain: choose with"),
        ({"text": "a", "label": {"x": 1}}, Columns(), r"the column 'label' of .* holds .*, which is no label"),
    ],
)
def test_what_is_not_plain_is_asked_for(record: Any, columns: Columns, sentence: str, tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "train.jsonl", [record])
    with pytest.raises(UsageError, match=sentence):
        own_task("mine", tmp_path / "mine", columns)


def test_many_whole_numbers_may_be_amounts(tmp_path: Path) -> None:
    write_split(tmp_path / "mine", "train.csv", [{"text": "a", "label": i} for i in range(257)])
    with pytest.raises(UsageError, match=r"257 different whole numbers: say whether .* --form regression"):
        own_task("mine", tmp_path / "mine", Columns())
    assert own_task("mine", tmp_path / "mine", Columns(form="classification")).form == "classification"


def test_tasks_are_built_in_or_in_the_folder(tmp_path: Path) -> None:
    write_glue(tmp_path)
    assert task_folders(tmp_path) == ["sst2", "stsb", "wiki"]
    assert find_task("sst2", None, Columns()) is SST2
    for data_dir, end in ((tmp_path, f"; {str(tmp_path)!r} holds sst2, stsb, wiki"), (None, "")):
        with pytest.raises(UsageError, match=f"there is no task 'sst': built in are sst2, .*{re.escape(end)}$"):
            find_task("sst", data_dir, Columns())
    with pytest.raises(UsageError, match="has no folder 'mrpc': it holds sst2, stsb, wiki"):
        read_task(TASKS["mrpc"], tmp_path)
    with pytest.raises(UsageError, match=r"--data_dir .* is no folder"):
        task_folders(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"'.*empty' holds no task: no train, validation or test split"):
        own_task("empty", tmp_path / "empty", Columns())
