"""SQuAD's exact match, F1 and threshold of no answer, on examples worked by hand."""

import pytest

from minilm.evaluation.squad_metrics import exact, f1, normalize, squad_scores


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("The  Eiffel\tTower.", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("theatre of another era", "theatre of another era"),
        ("U.S.-based", "usbased"),  # punctuation goes before words are looked at
        ("1,000–2,000", "1000–2000"),  # of punctuation only ASCII's goes
        ("“Quoted”", "“quoted”"),
        ("co-a", "coa"),
        ("l’a b", "l’ b"),  # a word ends at an apostrophe that stays
        ("ÉCOLE\u00a0normale", "école normale"),
        ("The", ""),
    ],
)
def test_normalized(answer: str, compared: str) -> None:
    assert normalize(answer) == compared


@pytest.mark.parametrize(
    ("prediction", "golds", "scores"),
    [
        ("the cat sat", ["cat sat down"], (0, 0.8)),  # 2 of 2 words, 2 of 3
        ("a a b b", ["b b b"], (0, 0.8)),  # articles go: 2 of 2, 2 of 3
        ("in Paris", ["London", "Paris", "in the Paris area"], (0, 0.8)),  # 2/3, then 2 of 2 and 2 of 3
        ("Paris!", ["London", "paris"], (1, 1)),
        ("cat", ["dog"], (0, 0)),
        ("", [], (1, 1)),
        ("the", [], (1, 1)),
        ("cat", [], (0, 0)),
        ("", ["cat"], (0, 0)),
        ("", ["The", "cat"], (0, 0)),  # a gold answer of nothing but an article does not count,
        ("", ["The"], (1, 1)),  # unless there is no other
    ],
)
def test_one_question(prediction: str, golds: list[str], scores: tuple[float, float]) -> None:
    assert (exact(prediction, golds), pytest.approx(f1(prediction, golds))) == scores


def test_questions_that_all_have_answers() -> None:
    scores = squad_scores(["Paris", "the cat sat"], [["Paris", "France"], ["cat sat down"]])
    assert scores == pytest.approx({"exact": 50, "f1": 90})


PREDICTIONS = ["Paris", "cat sat", "Rome", "Bonn", "red"]
GOLDS = [["Paris"], ["cat sat down"], [], ["Berlin"], []]
SCORES = [-5.0, -1.0, 0.5, 1.0, 2.0]


def test_questions_without_an_answer() -> None:
    """By hand: the third and fifth are rightly unanswered, the fourth wrongly; answered are the first two."""
    scores = squad_scores(PREDICTIONS, GOLDS, SCORES)
    assert scores == pytest.approx(
        {
            "exact": 60,  # 1 + 0 + 1 + 0 + 1
            "has_answer_exact": 100 / 3,
            "no_answer_exact": 100,
            "best_exact": 60,
            "best_exact_threshold": -5,  # the second adds nothing
            "f1": 76,  # 1 + 0.8 + 1 + 0 + 1
            "has_answer_f1": 60,
            "no_answer_f1": 100,
            "best_f1": 76,
            "best_f1_threshold": -1,
        }
    )


def test_a_score_of_just_the_threshold_is_an_answer() -> None:
    at, above = (squad_scores(PREDICTIONS, GOLDS, SCORES, threshold)["f1"] for threshold in (0.5, 0.4))
    assert (at, above) == pytest.approx((56, 76))
    assert squad_scores(PREDICTIONS, GOLDS, SCORES, -1.5)["f1"] == pytest.approx(60)


def test_the_best_threshold_reaches_beyond_a_wrong_answer() -> None:
    scores = squad_scores(["x", "Paris", "Rome"], [[], ["Paris"], ["Rome"]], [0.1, 0.2, 0.3])
    assert (scores["best_exact"], scores["best_exact_threshold"]) == (pytest.approx(200 / 3), 0.3)


def test_no_question_has_an_answer() -> None:
    probabilities = squad_scores(["x", "y"], [[], []], [0.3, 0.6], threshold=0.5)
    assert probabilities == pytest.approx(
        {
            **dict.fromkeys(("exact", "no_answer_exact", "f1", "no_answer_f1"), 50),
            **dict.fromkeys(("best_exact", "best_f1"), 100),
            **dict.fromkeys(("best_exact_threshold", "best_f1_threshold"), 0),
        }
    )


def test_the_threshold_below_all_scores_leaves_all_unanswered() -> None:
    predictions, golds, scores = ["x", "y"], [[], ["z"]], [-2.0, -3.0]
    threshold = squad_scores(predictions, golds, scores)["best_f1_threshold"]
    assert threshold == pytest.approx(-3)
    assert squad_scores(predictions, golds, scores, threshold)["f1"] == 50


def test_every_question_has_an_answer_and_may_be_left_unanswered() -> None:
    scores = squad_scores(["Paris", "Rome"], [["Paris"], ["Rome"]], [-1.0, 4.0])
    assert scores == pytest.approx(
        {
            **dict.fromkeys(("exact", "has_answer_exact", "f1", "has_answer_f1"), 50),
            **dict.fromkeys(("best_exact", "best_f1"), 100),
            **dict.fromkeys(("best_exact_threshold", "best_f1_threshold"), 4),
        }
    )


def test_an_empty_prediction_is_no_wrong_answer() -> None:
    scores = squad_scores(["", "Rome"], [[], ["Rome"]], [1.0, 2.0])
    assert (scores["best_f1"], scores["best_f1_threshold"]) == (100, 2)
