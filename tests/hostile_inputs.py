"""Broken and hostile data files and model folders, for the calls that `fuzz_commands.py` makes.

Model folders and data that would run code write a file named CANARY, so that what was run shows.
"""

import gzip
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_text import lines

CANARY = "code-was-run"
GOOD = "\n".join(lines(40)) + "\n"
BYTES = {
    "empty": b"",
    "blank": b" \n\t\n\r\n\n",
    "spaces of Unicode": "\u00a0\n\u2003\n\ufeff\n".encode(),
    "byte-order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "only a byte-order mark": b"\xef\xbb\xbf",
    "UTF-16": GOOD.encode("utf-16"),
    "CRLF": GOOD.replace("\n", "\r\n").encode(),
    "CR": GOOD.replace("\n", "\r").encode(),
    "control characters": b"".join(b"a%cb %d\n" % (code, code) for code in range(1, 32)),
    "NUL": b"\0\n" + GOOD.replace(" ", "\0").encode(),
    "not UTF-8": GOOD.encode() + b"caf\xe9\n",
    "right to left": ("\u202e\u2066a\u200f\u0644\n" + GOOD).encode(),
    "terminal escapes": b"\x1b[2J\x1b]0;title\x07 red\n" + GOOD.encode(),
    "combining": ("a" + "\u0301" * 5000 + "\n" + GOOD).encode(),
    "unassigned": ("\U000e0001\ufffe\uffff\n" + GOOD).encode(),
    "a long line": b"ab " * 100_000 + b"\n" + GOOD.encode(),
    "a long word": b"a" * 300_000 + b"\n" + GOOD.encode(),
    "tiny lines": b"a\n" * 20_000 + b"b\n",
    "one line": b"one line",
    "the same line": b"the same line\n" * 40,
    "random bytes": random.Random(0).randbytes(5000),
    "markup": b"<script>alert(1)</script>\n| a | b |\n```\n# heading\n[x](javascript:1)\n" + GOOD.encode(),
}
RECORDS = {
    "half of a surrogate pair": '{"text": "\\ud800"}\n' * 3,
    "NUL in a string": '{"text": "a\\u0000b"}\n{"text": "c"}\n' * 20,
    "deep arrays": "[" * 200_000,
    "deep objects": '{"text":' * 200_000,
    "a number of 10,000 digits": '{"text": ' + "9" * 10_000 + "}\n",
    "numbers": '{"text": 1}\n' * 3,
    "NaN": '{"text": NaN}\n' * 3,
    "null": '{"text": null}\n' * 3,
    "arrays": '{"text": ["a"]}\n' * 3,
    "no records": '"text"\n1\nnull\n',
    "an empty array": "[]",
    "an empty object": "{}",
    "a column twice": '{"text": "a", "text": 1}\n' * 3,
    "cut off": '{"text": "a"}\n{"text": "b',
    "good": "".join(json.dumps({"text": line, "label": len(line) % 2}) + "\n" for line in GOOD.splitlines()),
}
TABLES = {
    "good": "text,label\n" + "".join(f"{line},{len(line) % 2}\n" for line in GOOD.splitlines()),
    "an open quotation": 'text,label\n"a,1\n',
    "a quotation within": 'text,label\na"b"c,1\n"a"b,2\n',
    "a header alone": "text,label\n",
    "no column": "sentence,label\na,1\n",
    "the column twice": "text,text\na,b\nc,d\n",
    "too many fields": "text,label\na,1,2,3\n",
    "too few fields": "text,label\na\nb\n",
    "NUL": "text,label\na\0b,1\nc,2\n",
    "numbers": "text,label\n1,2\n3,4\n",
    "a field of a million letters": "text,label\n" + "a" * 1_000_000 + ",1\nb,2\n",
    "a formula": 'text,label\n"=HYPERLINK(""http://x"")",1\n@SUM(1),2\n',
}


class Pickled:
    """What writes the canary when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / CANARY)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def write_data(folder: Path) -> None:
    """Files of each kind of badness, and folders of them."""
    folder.mkdir(parents=True)

    def write(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)

    for name, content in BYTES.items():
        write(f"{name}.txt", content)
    for suffix in ("csv", "tsv", "json", "jsonl", "parquet", "arrow", "txt.gz", "txt.zst", "json.xz", "bin", "pkl"):
        for name in ("empty", "random bytes", "not UTF-8", "NUL"):
            write(f"{name}.{suffix}", BYTES[name])
    for name, text in RECORDS.items():
        write(f"{name}.jsonl", text.encode())
    for name, text in TABLES.items():
        write(f"{name}.csv", text.encode())
    write("cut off.txt.gz", gzip.compress(GOOD.encode())[:-20])
    write("good.txt.gz", gzip.compress(GOOD.encode()))
    write("pickle.arrow", pickle.dumps(Pickled(folder)))
    write("-.txt", GOOD.encode())
    write("--streaming", GOOD.encode())
    write("line\nbreak.txt", GOOD.encode())
    write("<b>|`.txt", GOOD.encode())
    write("\u202egpj.txt", GOOD.encode())
    os.mkfifo(folder / "pipe.txt")
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "loop").mkdir()
    (folder / "loop" / "loop").symlink_to(".")
    (folder / "nothing").mkdir()
    (folder / "code").mkdir()
    (folder / "code" / "code.py").write_text(f"open({str(folder / CANARY)!r}, 'w')\n")
    (folder / "saved").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (folder / "saved" / name).write_text('{"_data_files": [{"filename": "../../../etc/passwd"}]}')
    (folder / "splits").mkdir()
    (folder / "splits" / "dataset_dict.json").write_text("[]")


def write_tasks(folder: Path) -> None:
    """Folders of task data, each with a train and a validation file of one badness."""
    texts = {f"{name}.jsonl": text for name, text in RECORDS.items()} | {f"{n}.csv": t for n, t in TABLES.items()}
    for name, text in texts.items():
        task = folder / name.replace(" ", "-").replace(".", "-")
        task.mkdir(parents=True)
        for split in ("train", "validation"):
            (task / f"{split}{Path(name).suffix}").write_text(text)


VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 2, 3, 7, 10**6, 2**40, 10**400, 0.5, -0.5, float("nan"), float("inf"), "", "x"),
    *("gelu", "\0", [], [1], {}, {"a": 1}, "../..", "\x1b[31m", "a" * 10_000, [[[[]]]]),
]


def break_model(folder: Path, random: random.Random) -> str:
    """Breaks a good model folder in one way or two, and says how."""
    ways = [_break_file, _break_json, _break_json, _break_weights, _replace]
    return ", ".join(random.choice(ways)(folder, random) for _ in range(random.choice([1, 1, 2])))


def _break_file(folder: Path, random: random.Random) -> str:
    path = random.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    how = random.choice(["gone", "empty", "cut", "bytes", "bit", "list", "null", "object", "deep", "folder", "link"])
    content = path.read_bytes()
    if how in ("gone", "folder", "link"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to("nowhere")
        return f"{path.name} {how}"
    place = random.randrange(max(1, len(content)))
    flipped = bytearray(content)
    if content:
        flipped[place] ^= 1 << random.randrange(8)
    broken = {"empty": b"", "cut": content[:place], "bytes": random.randbytes(100), "bit": bytes(flipped)}
    broken |= {"list": b"[]", "null": b"null", "object": b"{}", "deep": b"[" * 100_000}
    path.write_bytes(broken[how])
    return f"{path.name} {how} at {place}"


def _break_json(folder: Path, random: random.Random) -> str:
    path = random.choice([path for path in sorted(folder.glob("*.json")) if path.is_file()] or [folder / "config.json"])
    try:
        content = json.loads(path.read_text("utf-8"))
        at: Any = content
        key = random.choice(sorted(at))
        while isinstance(at[key], dict) and at[key] and random.random() < 0.8:
            at = at[key]
            key = random.choice(sorted(at))
    except (OSError, ValueError, IndexError, TypeError, RecursionError):
        return "nothing"
    value = random.choice(VALUES)
    if random.random() < 0.2:
        del at[key]
        value = "gone"
    else:
        at[key] = value
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return f"{path.name} {key}={str(value)[:20]!r}"


def _break_weights(folder: Path, random: random.Random) -> str:
    path = folder / "model.safetensors"
    try:
        state = load_file(path)
        key = random.choice(sorted(state))
    except Exception:
        return "nothing"
    how = random.choice(["nan", "inf", "shape", "empty", "int", "gone", "foreign", "half", "index", "bin", "pickle"])
    tensor = state[key]
    if how in ("index", "bin", "pickle"):
        path.unlink()
        if how == "index":
            index = {"metadata": {}, "weight_map": {key: random.choice(["gone.safetensors", "../x", "", "/dev/zero"])}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        elif how == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            torch.save(state | {key: Pickled(folder)}, folder / "pytorch_model.bin")
        return how
    if how in ("nan", "inf"):
        state[key] = torch.full_like(tensor, float(how))
    elif how == "shape":
        state[key] = torch.zeros(3, 5)
    elif how == "empty":
        state[key] = torch.zeros(0)
    elif how == "int":
        state[key] = tensor.to(torch.int8)
    elif how == "half":
        state[key] = tensor.half()
    elif how == "foreign":
        state["decoder.layer.0.weight"] = torch.zeros(2)
    else:
        del state[key]
    save_file(state, path, {"format": "pt"})
    return f"{key} {how}"


def _replace(folder: Path, random: random.Random) -> str:
    """Custom code, an adapter, sentence-transformers files, settings of a generation."""
    how = random.choice(["auto_map", "auto_map", "adapter", "modules", "custom modules", "generation"])
    (folder / "custom.py").write_text(
        f"open({str(folder / CANARY)!r}, 'w')\nfrom transformers import BertConfig as C, BertModel as M\n"
    )
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    if how == "auto_map":
        name = random.choice(["config.json", "tokenizer_config.json"])
        target = {"AutoConfig": "custom.C", "AutoModel": "custom.M", "AutoTokenizer": ["custom.M", "custom.M"]}
        try:
            content = json.loads((folder / name).read_text("utf-8"))
            content |= {"auto_map": target, **({"model_type": "custom"} if random.random() < 0.5 else {})}
        except (OSError, ValueError, TypeError, RecursionError):
            return "nothing"
        (folder / name).write_text(json.dumps(content))
        return f"auto_map in {name}"
    if how == "adapter":
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    elif how == "modules":
        kinds = ["sentence_transformers.models.Pooling", "sentence_transformers.models.Dense", "x", "os.system", ""]
        place = random.choice(["1_Pooling", "../..", "", "/"])
        modules.append({"idx": 1, "name": "1", "path": place, "type": random.choice(kinds)})
        content = random.choice([modules, modules[1:], [], {}, [1], None])
        (folder / "modules.json").write_text(json.dumps(content))
    elif how == "custom modules":
        (folder / "modules.json").write_text(json.dumps([modules[0] | {"type": "custom.M"}]))
    else:
        (folder / "generation_config.json").write_text('{"max_length": -1, "temperature": "x"}')
    return how


def copied(good: Path, folder: Path) -> Path:
    """A fresh copy of a model folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    return folder
