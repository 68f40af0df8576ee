"""Smaller vocabularies: cut tokenizers split a text as the whole ones do, cut embeddings are the whole ones' rows."""

import email
import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import CommandLine
from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from minilm.cli.arguments import parse
from minilm.cli.demo import docstrings
from minilm.cli.stages import stages
from minilm.data.streams import TextStream
from minilm.data.texts import Texts
from minilm.data.vocabulary import Vocabulary, choose_vocabulary, count_stream, count_tokens, cut_tokenizer, find_kept
from minilm.models.vocabulary import cut_embeddings, named_tokens
from minilm.objectives.term import Objective

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
Model = dict[str, Any]


@cache
def texts() -> list[str]:
    """309 docstrings, 87 kB."""
    return docstrings(Path(email.__file__).parent)


def trained(model: Any, trainer: Any, pre_tokenizer: Any, lowercase: bool = False) -> Model:
    """As tokenizer.json has it."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if lowercase:
        tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.train_from_iterator(texts(), trainer)
    return dict(json.loads(tokenizer.to_str())["model"])


def word_piece() -> PreTrainedTokenizerBase:
    trainer = trainers.WordPieceTrainer(
        vocab_size=1200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    model = trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), lowercase=True)
    return BertTokenizer(vocab=model["vocab"])


def unigram() -> PreTrainedTokenizerBase:
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    model = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    return XLMRobertaTokenizer(vocab=[tuple(piece) for piece in model["vocab"]])


def byte_level_bpe() -> PreTrainedTokenizerBase:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model = trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def bpe_with_ends_of_words() -> PreTrainedTokenizerBase:
    """CLIP's kind."""
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    model = models.BPE(end_of_word_suffix="</w>", unk_token="<unk>")
    whole = trained(model, trainer, pre_tokenizers.Whitespace())
    merges = [tuple(pair) for pair in whole["merges"]]
    tokenizer = Tokenizer(models.BPE(whole["vocab"], merges, end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def bpe_with_every_merge() -> PreTrainedTokenizerBase:
    """Llama's kind: a token is made by each pair of tokens that it can be split into, and bytes spell the unknown."""
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=SPECIAL, show_progress=False)
    vocabulary = trained(models.BPE(), trainer, pre_tokenizers.Metaspace())["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [
        (text[:place], text[place:])
        for text in sorted(vocabulary, key=vocabulary.__getitem__)
        for place in range(1, len(text))
        if text[0] != "<" and text[:place] in vocabulary and text[place:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


TOKENIZERS: list[Callable[[], PreTrainedTokenizerBase]] = [
    *(word_piece, unigram, byte_level_bpe, bpe_with_ends_of_words, bpe_with_every_merge)
]


def counted(tokenizer: PreTrainedTokenizerBase, some: list[str]) -> Any:
    rows = datasets.Dataset.from_dict({"text": some})
    return count_tokens(Texts([rows], rows), tokenizer, 512)


def chosen(tokenizer: PreTrainedTokenizerBase, size: int = 250) -> Vocabulary:
    """Of every second text."""
    return choose_vocabulary(tokenizer, counted(tokenizer, texts()[::2]), size)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("make", TOKENIZERS)
def test_heldout_words_of_kept_tokens_are_split_as_before(
    tmp_path: Path, make: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """By the tokenizer in memory and by the one that its folder holds; other words are split, and known by letters."""
    whole = make()
    vocabulary = chosen(whole)
    cut = cut_tokenizer(whole, vocabulary.kept)
    cut.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == cut.get_vocab()
    assert len(cut) == len(vocabulary.kept) < len(whole) == vocabulary.whole
    same = other = 0
    for word in sorted(set(itertools.chain(*(text.split() for text in texts()[1::2])))):
        of_whole, of_cut = whole(word)["input_ids"], cut(word)["input_ids"]
        assert again(word)["input_ids"] == of_cut
        as_before = [vocabulary.kept[token] for token in of_cut] == of_whole
        assert as_before or not set(of_whole) <= set(vocabulary.kept), word
        assert whole.unk_token_id in of_whole or cut.unk_token_id not in of_cut or not word.isascii(), word
        same, other = same + as_before, other + (not as_before)
    assert same > 100
    assert other > 100


@pytest.mark.parametrize("make", TOKENIZERS)
def test_special_tokens_keep_their_parts(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    """Those that stand around a text, or two, and the one that pads a batch, under their new numbers."""
    whole = make()
    whole.add_special_tokens({"mask_token": "[behind all others]"})
    vocabulary = chosen(whole)
    cut = cut_tokenizer(whole, vocabulary.kept)
    assert cut.special_tokens_map == whole.special_tokens_map
    for tokenizer in (whole, cut):
        assert tokenizer.mask_token_id == tokenizer.get_vocab()[tokenizer.mask_token]
    pairs = [tokenizer(["a", "a a"], ["a", "a a"], padding=True) for tokenizer in (whole, cut)]
    assert cut_tokenizer(whole, vocabulary.kept).backend_tokenizer.padding["pad_id"] == cut.pad_token_id
    assert [[vocabulary.kept[token] for token in row] for row in pairs[1]["input_ids"]] == pairs[0]["input_ids"]


def test_the_most_used_are_kept_and_of_equally_used_ones_the_first() -> None:
    tokenizer = word_piece()
    words = [text for text in tokenizer.get_vocab() if text.isalpha() and len(text) > 3][:6]
    numbers = tokenizer.convert_tokens_to_ids(words)
    counts = np.zeros(len(tokenizer))
    counts[numbers] = [1, 5, 2, 2, 2, 1]
    counts[tokenizer.pad_token_id] = 100  # special ones do not count
    kept = {size: set(choose_vocabulary(tokenizer, counts, size).kept) & set(numbers) for size in (1, 3)}
    first_two = sorted(numbers[2:5])[:2]
    assert kept == {1: {numbers[1]}, 3: {numbers[1], *first_two}}
    assert choose_vocabulary(tokenizer, counts, 3).share == 9 / 13
    also = set(choose_vocabulary(tokenizer, counts, 1, also=[numbers[0], 5000]).kept)
    assert also & {*numbers, 5000} == {numbers[0], numbers[1]}


def test_a_merge_keeps_what_it_joins() -> None:
    vocabulary = {text: number for number, text in enumerate(["[UNK]", *"αβγδ", "βγ", "αβγ", "αβ", "γδ", "αβγδ"])}
    merges = [("β", "γ"), ("α", "βγ"), ("α", "β"), ("γ", "δ"), ("αβ", "γδ")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, merges, unk_token="[UNK]")), unk_token="[UNK]"
    )
    counts = np.zeros(10)
    counts[[vocabulary["αβγδ"], vocabulary["αβγ"]]] = [1, 2]
    assert chosen_texts(tokenizer, counts, 1) == ["[UNK]", *"αβγδ", "βγ", "αβγ"]
    counts[vocabulary["αβγδ"]] = 3
    assert chosen_texts(tokenizer, counts, 1) == ["[UNK]", *"αβγδ", "αβ", "γδ", "αβγδ"]


def test_a_merge_inside_a_word_keeps_its_mark() -> None:
    vocabulary = {text: number for number, text in enumerate(["α", "##β", "##γ", "αβ", "unused", "αβγ"])}
    model = models.BPE(vocabulary, [("α", "##β"), ("αβ", "##γ")], continuing_subword_prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    kept = choose_vocabulary(tokenizer, np.array([0, 0, 0, 0, 0, 1]), 1).kept
    assert kept == [0, 1, 2, 3, 5]
    assert cut_tokenizer(tokenizer, kept).tokenize("αβγ") == tokenizer.tokenize("αβγ") == ["αβγ"]


def chosen_texts(tokenizer: PreTrainedTokenizerBase, counts: Any, size: int) -> list[str]:
    return tokenizer.convert_ids_to_tokens(choose_vocabulary(tokenizer, counts, size).kept)


def test_bytes_spell_what_no_text_had() -> None:
    whole = bpe_with_every_merge()
    cut = cut_tokenizer(whole, chosen(whole).kept)
    assert cut.tokenize("Ж") == whole.tokenize("Ж") == ["▁", "<0xD0>", "<0x96>"]
    of_bytes = byte_level_bpe()
    cut = cut_tokenizer(of_bytes, chosen(of_bytes).kept)
    assert cut.decode(cut("Ж€")["input_ids"], skip_special_tokens=True) == "Ж€"


def test_an_unknown_letter_costs_what_it_did() -> None:
    """Of Unigram the piece with the least score stays, from which that cost is counted."""
    pieces = [("unused", -5.0), ("<unk>", 0.0), ("xb", -30.0), ("cde", -30.0), ("bcde", -1.0), ("rare", -100.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=1)))
    vocabulary = choose_vocabulary(tokenizer, np.array([0, 0, 1, 1, 1, 0]), 3)
    assert vocabulary.kept == [1, 2, 3, 4, 5]
    cut = cut_tokenizer(tokenizer, vocabulary.kept)
    assert cut.tokenize("xbcde") == tokenizer.tokenize("xbcde") == ["xb", "cde"]
    assert cut("y")["input_ids"] == [0]


ENDS: list[Any] = [
    processors.TemplateProcessing("[C] $A [S]", "[C] $A [S] $B [S]", [("[C]", 5), ("[S]", 6)]),
    processors.BertProcessing(("[S]", 6), ("[C]", 5)),
    processors.RobertaProcessing(("[S]", 6), ("[C]", 5)),
    processors.Sequence([processors.ByteLevel(), processors.BertProcessing(("[S]", 6), ("[C]", 5))]),
]


@pytest.mark.parametrize("ends", ENDS)
def test_tokens_around_a_text_get_their_new_numbers(ends: Any) -> None:
    """They stay though nothing else says that they are special."""
    vocabulary = {text: number for number, text in enumerate(["?", "a", "unused", "##a", "ab", "[C]", "[S]"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="?"))
    backend.post_processor = ends
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    kept = choose_vocabulary(tokenizer, np.array([0, 1, 0, 0, 0, 0, 0]), 1).kept
    assert kept == [0, 1, 3, 5, 6]
    cut = cut_tokenizer(tokenizer, kept)
    assert cut(["a", "aa"])["input_ids"] == [[3, 1, 4], [3, 1, 2, 4]]


def test_texts_count_by_their_weights() -> None:
    tokenizer = tiny_tokenizer()
    rows = [datasets.Dataset.from_dict({"text": some}) for some in (["a", "b"], ["a", "a a", "aa", "a"])]
    counts = count_tokens(Texts(rows, rows[0], shares=[0.75, 0.25]), tokenizer, 512)
    a, inside = tokenizer.convert_tokens_to_ids(["a", "##a"])
    assert counts[a] == 0.75 / 2 + 0.25 * 5 / 4
    assert counts[inside] == 0.25 / 4


def test_a_stream_is_counted_once_through_or_as_far_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.txt"
    tokenizer = tiny_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(list("klmnopqrst"))
    distinct = [f"{number:b}".replace("0", "a").replace("1", "b") for number in range(3000)]
    path.write_text("\n".join(f"{'klmnopqrst'[number % 10]} {word}" for number, word in enumerate(distinct)))

    def count() -> Any:
        return count_stream(TextStream([str(path)], tokenizer, batch_size=100, max_length=8, shuffle_buffer=50))

    assert 2850 <= count()[letters].sum() < 2850 + 100  # without the held-out ones
    monkeypatch.setattr("minilm.data.vocabulary.COUNTED_OF_STREAM", 250)
    assert count()[letters].sum() == 300


def test_what_cannot_be_cut_is_refused() -> None:
    counts = np.ones(57)
    with pytest.raises(ValueError, match=r"--student_vocabulary is 53, .* uses 52 of the tokenizer's 57 tokens"):
        choose_vocabulary(tiny_tokenizer(), counts, 53)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"cannot be cut .*: WordLevel is none of WordPiece, Unigram, BPE"):
        choose_vocabulary(words, counts, 1)
    with_gap = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"?": 0, "b": 2}, unk_token="?")), pad_token="[also 2]"
    )
    with pytest.raises(ValueError, match="cannot be cut: its tokens are not numbered in one row"):
        cut_tokenizer(with_gap, [0, 2])
    slow = type("ByT5", (), {"is_fast": False})()
    with pytest.raises(ValueError, match=r"the ByT5 cannot be cut .*: it has no tokenizer\.json"):
        cut_tokenizer(slow, [0])


KEPT = [0, 1, 2, 4, 5, 7, 9, 11, 30, 31, 33, 50, 57]
NUMBERS = torch.tensor([[1, 5, 8, 6, 9]])
FAMILIES = [
    *(("bert", "Model"), ("bert", "ForMaskedLM"), ("bert", "ForSequenceClassification"), ("roberta", "ForMaskedLM")),
    *(("xlm-roberta", "Model"), ("distilbert", "ForMaskedLM"), ("electra", "ForMaskedLM"), ("albert", "ForMaskedLM")),
    *(("modernbert", "ForMaskedLM"), ("gpt2", "LMHeadModel"), ("llama", "ForCausalLM"), ("mobilebert", "Model")),
    *(("mobilebert", "ForMaskedLM"), ("mobilebert", "ForPreTraining")),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_a_cut_model_knows_the_kept_tokens_as_before(tmp_path: Path, family: str, head: str, tied: bool) -> None:
    """As it is, and as it is loaded again; of a head the logits of the kept tokens."""
    whole, cut = (tiny_model(family, head, tie_word_embeddings=tied) for _ in range(2))
    for model in (whole, cut):
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, generator=draw)
    kept = sorted({*KEPT, *named_tokens(whole)})
    cut_embeddings(cut, kept)
    cut.save_pretrained(tmp_path)
    again = type(cut).from_pretrained(tmp_path)
    assert again.config.vocab_size == len(kept)
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor(kept)[NUMBERS])[0]
        if whole.get_output_embeddings() is not None:
            expected = expected[..., kept]
        for model in (cut, again):
            assert_close(model(input_ids=NUMBERS)[0], expected, rtol=1e-4, atol=1e-5)


def test_numbers_of_tokens_in_the_config_are_the_new_ones() -> None:
    model = tiny_model("gpt2", "LMHeadModel", eos_token_id=[57, 33], pad_token_id=40)
    model.config.sep_token_id = 3000  # no row
    assert {1, 57, 33, 40, 3000} <= named_tokens(model)
    cut_embeddings(model, KEPT)
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.sep_token_id) == (
        *(1, [12, 10], None, 3000),
    )
    assert model.generation_config.eos_token_id == [12, 10]
    bert = tiny_model("bert", pad_token_id=33)
    cut_embeddings(bert, KEPT)
    assert bert.get_input_embeddings().padding_idx == bert.config.pad_token_id == 10
    roberta = tiny_model("roberta", pad_token_id=3)
    assert named_tokens(roberta) == {0, 1, 2, 3}  # positions count from the padding's number
    cut_embeddings(roberta, [*range(8), 33])
    assert (roberta.get_input_embeddings().padding_idx, roberta.config.pad_token_id) == (3, 3)


def test_a_model_that_knows_more_of_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="the EsmModel cannot be cut to --student_vocabulary: its embeddings are not"):
        cut_embeddings(tiny_model("esm"), KEPT)


def run_of(teacher: Path, data: Path, output: str, *flags: str) -> list[str]:
    return [
        *("--teacher", str(teacher), "--data", str(data), "--output_dir", output, "--student_vocabulary", "150"),
        *("--student_num_layers", "2", "--max_steps", "4", "--per_device_train_batch_size", "4", "--max_length", "32"),
        *("--save_steps", "2", "--logging_steps", "2", "--disable_tqdm", "true", "--use_cpu", "--output_weight", "0.5"),
        *("--learning_rate", "1e-2", "--save_total_limit", "5", *flags),
    ]


@pytest.fixture
def masked_lm(tmp_path: Path) -> Path:
    """A teacher whose embeddings have more rows than its tokenizer tokens."""
    tiny_model("bert", "ForMaskedLM", vocab_size=1216).save_pretrained(tmp_path / "teacher")
    word_piece().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "docstrings.txt"
    path.write_text("\n".join(" ".join(text.split()) for text in texts()), encoding="utf-8")
    return path


@pytest.mark.parametrize("flags", [[], ["--streaming", "--shuffle_buffer", "64"]])
def test_a_run_leaves_a_student_of_the_smaller_vocabulary_and_goes_on_bitwise(
    masked_lm: Path, lines: Path, command: CommandLine, flags: list[str]
) -> None:
    code, out, err = command(*run_of(masked_lm, lines, "whole", *flags))
    assert (code, err) == (0, "")
    argv = run_of(masked_lm, lines, "rest", *flags, "--resume_from_checkpoint", "whole/checkpoint-2")
    assert command(*argv)[0] == 0
    students = [AutoModelForMaskedLM.from_pretrained(folder) for folder in ("whole", "rest")]
    assert_close(students[1].state_dict(), students[0].state_dict(), rtol=0, atol=0)
    code, _, err = command(*argv, "--student_vocabulary", "151", "--output_dir", "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "belongs to another run: its student_vocabulary is 150, this run's is 151" in err

    spelt = masked_lm / "tokenizer.json"
    kept = spelt.read_text().replace('"the"', '"other"').replace('"of"', '"the"').replace('"other"', '"of"')
    spelt.write_text(kept)
    code, _, err = command(*argv, "--output_dir", "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "belongs to another run: its hash of the student's tokens is" in err

    tokenizer, student = AutoTokenizer.from_pretrained("whole"), AutoModel.from_pretrained("whole")
    rows = student.get_input_embeddings().num_embeddings
    assert len(tokenizer) == rows == student.config.vocab_size == students[0].get_output_embeddings().out_features
    assert 150 < rows < 400
    metrics = json.loads(Path("whole/metrics.json").read_text())
    data = metrics["data"]["vocabulary"]
    assert (data["kept"], data["of"]) == (rows, 1200)
    assert f"; {rows:,} of the teacher's 1,200 tokens, {data['share']:.1%} of those in the text" in out
    embedding = {side: count["embedding"] for side, count in metrics["parameters"].items()}
    assert embedding["teacher"] - embedding["student"] == 32 * (1216 - rows)


def test_a_student_starts_with_the_teachers_rows(masked_lm: Path, lines: Path, command: CommandLine) -> None:
    """Its layers are the teacher's, all of them, and nothing is learnt: the kept tokens mean what they did."""
    argv = run_of(masked_lm, lines, "out", "--student_num_layers", "4", "--learning_rate", "0")
    assert command(*argv)[0] == 0
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (masked_lm, "out")]
    teacher, student = (AutoModelForMaskedLM.from_pretrained(folder) for folder in (masked_lm, "out"))
    kept = tokenizers[0].convert_tokens_to_ids(tokenizers[1].convert_ids_to_tokens(range(len(tokenizers[1]))))
    ids = torch.tensor([tokenizers[1]("the message of a header")["input_ids"]])
    with torch.no_grad():
        expected = teacher(torch.tensor(kept)[ids]).logits[..., kept]
        assert_close(student(ids).logits, expected, rtol=1e-4, atol=1e-5)
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["agreement"]["start"] == {"correlation": pytest.approx(1), "neighbours": 1}
    assert all(ends["start"] == pytest.approx(0, abs=1e-5) for ends in metrics["heldout"].values())


def test_terms_that_were_tried_on_the_whole_vocabulary_train_on_the_smaller(
    masked_lm: Path, lines: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TinyBERT's read the embeddings, which are cut between the trial and the training, also where its loss is kept."""
    probe: Any = Objective.probe
    losses: list[torch.Tensor] = []

    def kept(*models: Any) -> torch.Tensor:
        losses.append(probe(*models))
        return losses[-1]

    monkeypatch.setattr(Objective, "probe", kept)
    flags = ["--objective", "tinybert", "--output_weight", "0", "--student_hidden_size", "16"]
    code, _, err = command(*run_of(masked_lm, lines, "out", *flags))
    assert (code, err) == (0, "")
    assert losses
    before, after = (AutoModel.from_pretrained(folder) for folder in ("out/checkpoint-2", "out"))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)


def test_too_large_a_vocabulary_ends_the_start(masked_lm: Path, lines: Path, command: CommandLine) -> None:
    code, _, err = command(*run_of(masked_lm, lines, "out", "--student_vocabulary", "1190"))
    assert (code, err.count("\n")) == (2, 1)
    assert "--student_vocabulary is 1190, and the text to train on uses " in err
    code, _, err = command(*run_of(masked_lm, lines, "out", "--student_vocabulary", "0"))
    assert (code, err) == (2, "minilm-train: error: --student_vocabulary is 0: it must be at least 1\n")


def test_a_student_that_was_cut_alike_goes_on(masked_lm: Path, lines: Path, command: CommandLine) -> None:
    assert command(*run_of(masked_lm, lines, "first"))[0] == 0
    argv = run_of(masked_lm, lines, "second", "--student", "first", "--learning_rate", "0")
    sizes = argv.index("--student_num_layers")
    del argv[sizes : sizes + 2]
    code, _, err = command(*argv)
    assert (code, err) == (0, "")
    first, second = (AutoModelForMaskedLM.from_pretrained(folder) for folder in ("first", "second"))
    assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in ("first", "second")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    ends = [json.loads(Path(folder, "metrics.json").read_text()) for folder in ("first", "second")]
    assert ends[1]["heldout"]["output"]["start"] == pytest.approx(ends[0]["heldout"]["output"]["end"], rel=1e-4)
    assert ends[1]["parameters"] == ends[0]["parameters"]

    rows = len(tokenizers[0])
    code, _, err = command(*argv, "--student_vocabulary", "160", "--output_dir", "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "--student_vocabulary 160 keeps " in err
    assert f" for the text to train on, and the student 'first' was cut to {rows}: it lacks '" in err
    AutoTokenizer.from_pretrained(masked_lm).save_pretrained("first")
    code, _, err = command(*argv, "--output_dir", "other")
    assert (code, err) == (
        2,
        f"minilm-train: error: the student 'first' embeds {rows} tokens, its tokenizer has 1200\n",
    )


def test_only_a_cut_tokenizer_tells_what_was_kept() -> None:
    whole = word_piece()
    kept = [*range(5), *range(40, 90, 7)]
    cut = cut_tokenizer(whole, kept)
    assert find_kept(whole, cut) == kept
    with pytest.raises(ValueError, match=r"of 1200 tokens is not the teacher's of 13 cut: '.*' is none of the teacher"):
        find_kept(cut, whole)
    fifth, last = (str(cut.convert_ids_to_tokens(number)) for number in (5, 12))
    spelt = (
        cut.backend_tokenizer.to_str().replace(f'"{fifth}":5', f'"{fifth}":12').replace(f'"{last}":12', f'"{last}":5')
    )
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spelt))
    with pytest.raises(
        ValueError, match=r"of 13 tokens is not the teacher's of 1200 cut: '.*' is its token 12, and .* 5"
    ):
        find_kept(whole, other)


def test_an_assistant_has_the_whole_vocabulary(masked_lm: Path, lines: Path) -> None:
    first, second = stages(parse(run_of(masked_lm, lines, "out", "--assistant_num_layers", "3")))
    assert (first.model.student_vocabulary, second.model.student_vocabulary) == (None, 150)
