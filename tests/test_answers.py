"""From questions and contexts to windows, and from logits of windows back to answers."""

import string
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset
from tiny_text import tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from minilm.errors import UsageError
from minilm.evaluation.answer_windows import evaluation_windows, training_windows
from minilm.evaluation.answers import best_answers, best_spans

CONTEXT = " ".join(string.ascii_lowercase[:20])  # a token each: token t is characters 2 t to 2 t + 1
NONE: dict[str, list[Any]] = {"text": [], "answer_start": []}


@pytest.fixture(autouse=True)
def no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pair_tokenizer(pair: str = "[CLS] $A [SEP] $B:1 [SEP]:1") -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", pair, special)
    return tokenizer


def gold(text: str, start: int | None = None, context: str = CONTEXT) -> dict[str, list[Any]]:
    return {"text": [text], "answer_start": [context.index(text) if start is None else start]}


def records(*answers: dict[str, list[Any]], question: str = "x y", context: str = CONTEXT) -> Dataset:
    return Dataset.from_list([{"question": question, "context": context, "answers": each} for each in answers])


def texts(windows: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(ids) for ids in windows["input_ids"]]


# Of 16 tokens 3 are special and 2 the question's: 11 are left, of which 5 overlap.
WINDOWS = [
    "[CLS] x y [SEP] a b c d e f g h i j k [SEP]",
    "[CLS] x y [SEP] g h i j k l m n o p q [SEP]",
    "[CLS] x y [SEP] m n o p q r s t [SEP]",
]


def test_a_context_is_cut_into_windows_that_overlap_by_a_third() -> None:
    tokenizer = pair_tokenizer()
    windows = evaluation_windows(records(NONE, NONE), tokenizer, 16)
    assert texts(windows, tokenizer) == WINDOWS * 2
    assert windows["record"][:] == [0, 0, 0, 1, 1, 1]
    assert windows["first"][:] == [4] * 6
    assert windows["null"][:] == [0] * 6
    assert windows["begins"][2] == list(range(24, 40, 2))
    assert windows["ends"][2] == list(range(25, 41, 2))
    assert len(evaluation_windows(records(NONE), tokenizer, 25)) == 1
    many = evaluation_windows(records(*[NONE] * 1001, context="a"), tokenizer, 16)
    assert many["record"][:] == list(range(1001))


def test_the_answers_place_in_each_window() -> None:
    """By hand, in the windows above: whole in it, or the null token."""
    tokenizer = pair_tokenizer()
    golds = [gold("a"), gold("h i"), gold("j k l"), gold("f g h i j k l"), gold(" t"), NONE]
    windows = training_windows(records(*golds), tokenizer, 16)
    found = list(zip(windows["start_positions"], windows["end_positions"], strict=True))
    assert [found[i : i + 3] for i in range(0, 18, 3)] == [
        [(4, 4), (0, 0), (0, 0)],
        [(11, 12), (5, 6), (0, 0)],
        [(0, 0), (7, 9), (0, 0)],
        [(0, 0), (0, 0), (0, 0)],
        [(0, 0), (0, 0), (11, 11)],  # without its white space
        [(0, 0), (0, 0), (0, 0)],
    ]


def test_the_first_of_several_golds_is_learnt() -> None:
    several = {"text": ["c d", "a"], "answer_start": [4, 0]}
    windows = training_windows(records(several), pair_tokenizer(), 16)
    assert (windows["start_positions"][0], windows["end_positions"][0]) == (6, 7)


def test_part_of_a_token_and_several_tokens_of_a_word() -> None:
    """A word of three tokens; an answer that begins and ends within tokens takes them whole."""
    tokenizer = pair_tokenizer()
    data = records(gold("bc d", 1, "abc def"), gold("abc", 0, "abc def"), context="abc def")
    windows = training_windows(data, tokenizer, 16)
    assert windows["start_positions"][:] == [5, 4]
    assert windows["end_positions"][:] == [7, 6]
    tokenizer.backend_tokenizer.pre_tokenizer = None  # question and context are one token each
    whole = training_windows(data, tokenizer, 16)
    assert (whole["start_positions"][0], whole["end_positions"][0]) == (3, 3)


@pytest.mark.parametrize(
    ("pair", "first", "null"),
    [
        ("[CLS] $A [SEP] [SEP] $B [SEP]", 5, 0),  # as RoBERTa's
        ("$A [SEP] $B:1 [SEP]:1 [CLS]:2", 3, -1),  # as XLNet's
        ("$A [SEP] $B [SEP]", 3, 0),  # as T5's: no CLS token
    ],
)
def test_pairs_of_other_models(pair: str, first: int, null: int) -> None:
    windows = evaluation_windows(records(NONE), pair_tokenizer(pair), 16)
    lengths = [len(ids) for ids in windows["input_ids"]]
    assert windows["first"][:] == [first] * len(lengths)
    assert windows["null"][:] == [null % length for length in lengths]
    tokens = {begin for begins in windows["begins"] for begin in begins}
    assert tokens == set(range(0, 40, 2))


def test_a_long_question_is_cut_and_a_tokenizer_without_token_types_gives_none() -> None:
    tokenizer = pair_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    windows = evaluation_windows(records(NONE, question=f" {CONTEXT} ?"), tokenizer, 16)
    assert texts(windows, tokenizer)[0] == "[CLS] a b c d e [SEP] a b c d e f g h [SEP]"
    assert "token_type_ids" not in windows.column_names
    long = evaluation_windows(records(NONE, question="a " * 99), tokenizer, 384)
    assert long["first"][0] == 66


def test_too_short_a_length_and_a_tokenizer_without_offsets_are_one_line() -> None:
    with pytest.raises(UsageError, match=r"max_length 9 leaves no room .* 3 special tokens"):
        evaluation_windows(records(NONE), pair_tokenizer(), 9)
    assert evaluation_windows(records(NONE), pair_tokenizer(), 10)

    class SlowTokenizer:
        is_fast = False

    with pytest.raises(UsageError, match="the tokenizer is a SlowTokenizer, which does not tell where"):
        training_windows(records(NONE), SlowTokenizer(), 16)  # type: ignore[arg-type]


def logits(windows: Dataset, peaks: dict[tuple[int, int], float]) -> np.ndarray:
    """(W, N): 0 but at (window, token); behind each window what no answer may come from."""
    longest = max(len(ids) for ids in windows["input_ids"])
    made = np.full((len(windows), longest + 1), 1000.0, dtype=np.float32)
    for window, ids in enumerate(windows["input_ids"]):
        made[window, : len(ids)] = 0
    for at, value in peaks.items():
        made[at] = value
    return made


def answers(start: dict[tuple[int, int], float], end: dict[tuple[int, int], float]) -> tuple[str, float]:
    """Of the windows above."""
    windows = evaluation_windows(records(NONE), pair_tokenizer(), 16)
    [text], [score] = best_answers(windows, [CONTEXT], logits(windows, start), logits(windows, end))
    return text, score


def test_an_answer_in_the_second_window() -> None:
    assert answers({(0, 4): 2, (1, 9): 3}, {(0, 5): 2, (1, 11): 3}) == ("l m n", -6)


def test_start_and_end_of_different_windows_are_no_span() -> None:
    assert answers({(0, 4): 5}, {(0, 8): 1, (1, 8): 5}) == ("a b c d e", -6)
    # "k" ends the first window, "l" stands in the others: no span reaches from one to the next.
    assert answers({(0, 14): 5}, {(1, 9): 4.5, (0, 14): 1}) == ("k", -6)


def test_the_null_score_is_the_lowest_of_all_windows() -> None:
    null = {(0, 0): 9.0, (1, 0): 4.0, (2, 0): 7.0}
    assert answers({**null, (0, 5): 3}, {**null, (0, 5): 3}) == ("b", 8 - 6)
    assert answers({**null, (0, 5): 5}, {**null, (0, 5): 5}) == ("b", 8 - 10)


def test_spans_out_of_the_context_or_backwards_do_not_count() -> None:
    question = {(0, 1): 9.0, (0, 2): 9.0, (0, 3): 9.0, (0, 15): 9.0}
    assert answers({**question, (0, 8): 3}, {**question, (0, 6): 4, (0, 9): 2}) == ("e f", -5)


def test_an_empty_context_has_no_answer() -> None:
    windows = evaluation_windows(records(NONE, context=""), pair_tokenizer(), 16)
    zeros = np.zeros((1, 5), dtype=np.float32)
    assert best_answers(windows, [""], zeros, zeros) == ([""], [np.inf])


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_equal_to_looking_at_every_span(longest: int) -> None:
    generator = np.random.default_rng(longest)
    start, end = generator.standard_normal((2, 50, 23), dtype=np.float32)
    first, last = np.sort(generator.integers(0, 23, (2, 50)), axis=0)
    allowed = (first[:, None] <= np.arange(23)) & (np.arange(23) <= last[:, None])
    scores, starts, lasts = best_spans(start, end, allowed, longest)
    for window in range(50):
        spans = {
            (i, j): start[window, i] + end[window, j]
            for i in range(first[window], last[window] + 1)
            for j in range(i, min(i + longest, last[window] + 1))
        }
        best = max(spans, key=spans.__getitem__)
        assert ((starts[window], lasts[window]), scores[window]) == (best, spans[best])


def test_the_answer_of_each_record_is_the_best_of_its_own_windows() -> None:
    """Random logits of records of several windows each, against every span of every window."""
    tokenizer = pair_tokenizer()
    contexts = [CONTEXT[: 2 * count - 1] for count in (3, 20, 11, 14)]
    data = Dataset.from_list([{"question": "x", "context": context, "answers": NONE} for context in contexts])
    windows = evaluation_windows(data, tokenizer, 16)
    shape = (2, len(windows), max(map(len, windows["input_ids"])))
    start, end = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    found = best_answers(windows, contexts, start, end)
    for record, context in enumerate(contexts):
        spans: dict[str, float] = {}
        nulls = []
        for window in np.flatnonzero(np.array(windows["record"]) == record):
            tokens = windows["input_ids"][window]
            nulls.append(start[window, 0] + end[window, 0])
            for i in range(3, len(tokens) - 1):
                for j in range(i, len(tokens) - 1):
                    text = tokenizer.decode(tokens[i : j + 1])
                    assert text in context
                    spans[text] = max(spans.get(text, -np.inf), start[window, i] + end[window, j])
        best = max(spans, key=spans.__getitem__)
        assert found.texts[record] == best
        assert found.no_answer_scores[record] == pytest.approx(min(nulls) - spans[best])
