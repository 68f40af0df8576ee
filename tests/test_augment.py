"""Augmented task data: which words may take a word's place, how often they do, and what the command writes."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from minilm.cli import augment
from minilm.data.augment import augmented
from minilm.data.records import read_records, read_vectors
from minilm.models.substitutes import Place, Substitutes

TEXTS = ["a b, cd", "(e f g h i) ab!", "k"]
LETTERS = set("abcdefghijklmnopqrstuvwxyz")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("bert", "ForMaskedLM")


def spans(text: str, places: list[Place]) -> list[str]:
    return [text[place.start : place.end] for place in places]


def test_a_word_of_one_token_gets_what_the_masked_lm_predicts_there(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    found = Substitutes(model, tokenizer, count=4, batch_size=3)(TEXTS)
    assert [spans(text, places) for text, places in zip(TEXTS, found, strict=True)] == [
        *(["a", "b", "cd"], ["e", "f", "g", "h", "i", "ab"], ["k"]),
    ]
    letters = tokenizer.convert_tokens_to_ids(sorted(LETTERS))
    for text, places in zip(TEXTS, found, strict=True):
        for place in places:
            word = text[place.start : place.end]
            if len(word) == 1:
                masked = tokenizer(f"{text[: place.start]}[MASK]{text[place.end :]}", return_tensors="pt")
                with torch.no_grad():
                    logits = model(**masked).logits[masked["input_ids"] == tokenizer.mask_token_id][0]
                best = sorted(LETTERS - {word}, key=lambda x: -logits[letters[ord(x) - ord("a")]].item())
                assert place.words == best[:4]


def test_signs_that_a_tokenizer_takes_into_its_words_stay(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = '"a" (cd), e.'
    assert spans(text, Substitutes(model, tokenizer)([text])[0]) == ["a", "cd", "e"]


def test_no_word_is_its_own_substitute_by_another_token(model: Any) -> None:
    """Byte-level BPE has one token for a word behind a blank and one for it at the beginning."""
    tokenizer = bpe_tokenizer("the cat sat on the mat with the hats of cats, the dogs ran")
    own = tiny_model("roberta", "ForMaskedLM", vocab_size=len(tokenizer), pad_token_id=1)
    text = "the cat, the Dogs"
    found = Substitutes(own, tokenizer, count=100)([text])[0]
    assert spans(text, found) == ["the", "cat", "the", "Dogs"]
    for place in found:
        word = text[place.start : place.end].lower()
        assert {"the", "cat", "sat", "dogs", word} - set(place.words) == {word}


def bpe_tokenizer(text: str) -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    )


def nearest(vector: Tensor, table: Tensor, names: list[str], count: int) -> list[str]:
    places = functional.cosine_similarity(table, vector[None]).argsort(descending=True)
    return [names[place] for place in places.tolist()][:count]


def test_a_word_of_several_tokens_gets_the_neighbours_of_their_mean(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    found = Substitutes(model, tokenizer, count=3)(["cd e"])[0][0]
    table = model.get_input_embeddings().weight.detach()
    names = sorted(LETTERS)
    pieces = table[tokenizer.convert_tokens_to_ids(["c", "##d"])].mean(0)
    assert found == Place(0, 2, nearest(pieces, table[tokenizer.convert_tokens_to_ids(names)], names, 3))


def test_vectors_of_a_file_take_the_embeddings_place(model: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["cd", "some", "of", "a . b", "words"]  # GloVe's largest file has blanks in words
    table = torch.randn(5, 4, generator=generator)
    path = tmp_path / "glove.txt"
    path.write_text(
        "\n".join(f"{name} {' '.join(map(str, row.tolist()))}" for name, row in zip(names, table, strict=True)) + "\n"
    )
    words, vectors = read_vectors(path)
    assert words == names
    torch.testing.assert_close(vectors, table)
    found = Substitutes(model, tiny_tokenizer(), count=3, vectors=(words, vectors))(["Cd xy e"])[0]
    assert found[0] == Place(0, 2, nearest(table[0], table, names, 4)[1:])
    assert [place.start for place in found] == [0, 6]  # the file has no "xy"


def test_vectors_that_cannot_be_read_are_told_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("a 1 2 3\nb 1 2\n")
    with pytest.raises(ValueError, match="at row 2: it holds 2 numbers behind a word, the first row 3"):
        read_vectors(path)
    path.write_text("a 1 2 3\nb 1 2 x\n")
    with pytest.raises(ValueError, match="at row 2: could not convert"):
        read_vectors(path)
    path.write_text("a 1 2\nb 1 2 3\n")
    with pytest.raises(ValueError, match="at row 2: it holds 3 numbers behind a word, the first row 2"):
        read_vectors(path)
    path.write_text("2 3\na 1 2 3\n. . 1 2 3\n")  # as fastText begins; GloVe has words with blanks
    assert read_vectors(path)[0] == ["a", ". ."]
    path.write_text("")
    with pytest.raises(ValueError, match="holds no vectors"):
        read_vectors(path)


def test_each_word_is_replaced_with_the_probability_by_one_of_its_substitutes() -> None:
    text = "one (two), three."
    places = {"text": [Place(0, 3, ["1", "uno"]), Place(5, 8, ["2"]), Place(11, 16, ["3", "tre"])]}
    record = {"text": text, "label": 1}
    first, *copies = augmented(record, places, 2000, 0.4, random.Random(0))
    assert first == record
    assert len(copies) == 2000
    assert all(copy["label"] == 1 for copy in copies)
    parts = [copy["text"].replace("(", "").replace("),", "").rstrip(".").split() for copy in copies]
    for position, (own, others) in enumerate([("one", {"1", "uno"}), ("two", {"2"}), ("three", {"3", "tre"})]):
        drawn = [words[position] for words in parts]
        assert set(drawn) == {own, *others}
        assert sum(word != own for word in drawn) / 2000 == pytest.approx(0.4, abs=0.04)
    assert list(augmented(record, {"text": []}, 20, 0.4, random.Random(0))) == [record]


@pytest.fixture
def run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`minilm-augment` in a folder with a teacher; gives (exit code, stdout, stderr without bars)."""
    import datasets

    monkeypatch.chdir(tmp_path)
    model.save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    datasets.disable_progress_bars()

    def main(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = augment.main(list(argv))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return main


def test_the_command_writes_each_record_and_its_copies(run: Run, tmp_path: Path) -> None:
    Path("data.tsv").write_text("text\tother\tlabel\n" + "".join(f"{text}\tx y\t{i}\n" for i, text in enumerate(TEXTS)))
    flags = ("data.tsv", "--teacher", "teacher", "--second_column", "other", "--samples", "30", "--candidates", "3")
    code, out, _ = run(*flags, "--output", "a.jsonl")
    assert (code, out) == (0, "a.jsonl: 93 records, of the 3 in data.tsv\n")
    records = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [record["label"] for record in records] == [label for label in "012" for _ in range(31)]
    assert [record["text"] for record in records[::31]] == TEXTS
    for column in ("text", "other"):
        assert len({record[column] for record in records[:31]}) > 3
    assert list(records[0]) == ["text", "other", "label"]

    assert run(*flags, "--output", "b.jsonl", "--batch_size", "2")[0] == 0
    assert Path("b.jsonl").read_bytes() == Path("a.jsonl").read_bytes()
    assert run(*flags, "--output", "c.jsonl", "--seed", "1")[0] == 0
    assert Path("c.jsonl").read_bytes() != Path("a.jsonl").read_bytes()


def test_types_of_json_stay_as_they_are(tmp_path: Path) -> None:
    records = [{"label": 0.5, "text": "a", "more": [1, None]}, {"text": "b", "label": 1}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert list(read_records(path, ["text"])) == records


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--output", "out.csv"], 2, "argument --output: 'out.csv' does not end in .jsonl"),
        (["--samples", "0"], 2, "argument --samples: '0' is no number from 1 up"),
        (["--probability", "1.5"], 2, "argument --probability: '1.5' is no number above 0 and up to 1"),
        (["--output", "there.jsonl"], 1, "'there.jsonl' exists: name another --output, or remove it"),
        (["--output", "none/out.jsonl"], 1, "the folder of --output 'none/out.jsonl' is not there"),
        (["--text_column", "body"], 1, "cannot read 'data.csv' at row 1: it has no column 'body'; choose from ['text'"),
        (["--glove", "there.jsonl"], 1, "'there.jsonl' holds no vectors"),
        (["--teacher", "body"], 2, "the teacher 'body' has no trained head (it was saved as BertModel)"),
        (["--teacher", "decoder"], 2, "a GPT2LMHeadModel: masked words are predicted by a masked LM"),
    ],
)
def test_each_mistake_is_one_line_and_leaves_no_file(run: Run, flags: list[str], code: int, told: str) -> None:
    Path("data.csv").write_text("text,label\na b,0\n")
    Path("there.jsonl").write_text("")
    for name, family, head in (("body", "bert", "Model"), ("decoder", "gpt2", "LMHeadModel")):
        if name in flags:
            tiny_model(family, head).save_pretrained(name)
            tiny_tokenizer().save_pretrained(name)
    before = {path.name for path in Path().iterdir()}
    done = run("data.csv", "--teacher", "teacher", "--output", "out.jsonl", *flags)
    assert done[:2] == (code, "")
    line = done[2].splitlines()[-1]  # behind transformers' bar of loading
    assert line.startswith("minilm-augment: error: ")
    assert told in line
    assert "--output_weight" not in line
    assert {path.name for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.csv", "text,label\na,0\nb,1,2\n", "at row 2: it has 3 fields, the header 2"),
        ("data.jsonl", '{"text": "a"}\n{"text": 1}\n', "at row 2: the column 'text' holds 1, not text"),
        ("data.jsonl", '{"text": "a", "also": "\\ud800"}\n', "at row 1: .*surrogates not allowed"),
        ("data.jsonl", '["a"]\n', r"at row 1: \"\['a'\]\" is no record"),
        ("data.txt", "a\n", "is no .csv, .tsv or .jsonl file"),
    ],
)
def test_records_that_cannot_be_read_are_told_with_their_row(
    tmp_path: Path, name: str, content: str, told: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        list(read_records(tmp_path / name, ["text"]))
