"""Task data for tests: folders of a few records, in any kind of file."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

Records = Sequence[dict[str, Any]]


def write_split(folder: Path, name: str, records: Records) -> Path:
    """A file of records, of the kind that its name tells."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.suffix == ".parquet":
        Dataset.from_list(list(records)).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    else:
        path.write_text(json.dumps({"version": 1, "data": list(records)}), encoding="utf-8")
    return path


def sentences(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Distinct records as SST-2's: class 1 where the text is of a's."""
    return [{"sentence": ("b a"[i % 2 * 2] + " ") * 3 + f"{i:b}", "label": i % 2} for i in range(first, first + count)]


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Records as STS-B's."""
    words = ["a b c", "a b d", "x y z", "a x y b"]
    return [
        {"sentence1": words[i % 4], "sentence2": f"{words[i // 4 % 4]} {i:b}", "label": i % 7 / 2.0}
        for i in range(first, first + count)
    ]


def write_glue(data_dir: Path) -> Path:
    """Tiny sst2 and stsb, and a folder of text that is no task."""
    for split, first, count in (("train", 0, 24), ("validation", 24, 12)):
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
        (data_dir / "sst2").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(sentences(count, first), features).to_parquet(data_dir / "sst2" / f"{split}.parquet")
        write_split(data_dir / "stsb", f"{split}.jsonl", pairs(count, first))
    write_split(data_dir / "wiki", "train.csv", [{"text": "a b"}, {"text": "c"}])
    return data_dir
