"""Names and texts of others show as they are, in a terminal, in Markdown, in a plot, in reports; none is obeyed."""

import re
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_report import METRICS

from minilm.cli.report import model_card, overview, report_markdown
from minilm.cli.terminal import LONGEST_ERROR, fail
from minilm.escapes import markdown, plot_label, printable
from minilm.evaluation.plot import plot_quality
from minilm.evaluation.table import Judged, all_scores, results_table

HOSTILE = "a|b\n# <b>`x` \x1b[2J\u202e$y$ *z* [l](javascript:1)"
SHOWN = r"a\|b\\n# \<b\>\`x\` \\x1b\[2J\\u202e\$y\$ \*z\* \[l\](javascript:1)"
SCORES = {HOSTILE: {"validation": {"accuracy": 50.0}}}


def judged(name: str) -> Judged:
    return Judged(name, {"embedding": 1, "transformer": 1, "total": 2}, 10.0, SCORES)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("bert-base-uncased", "bert-base-uncased"),
        ("my_model_1", "my_model_1"),
        ("_init_", r"\_init\_"),
        ("# heading", r"\# heading"),
        ("- item", r"\- item"),
        ("12. item", r"12\. item"),
        ("1.5 times", "1.5 times"),
        ("a # b - c", "a # b - c"),
        ("&lt; ~~x~~ \\", r"\&lt; \~\~x\~\~ \\"),
        ("", ""),
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_a_terminal_gets_no_character_that_it_obeys() -> None:
    assert printable("a\x1b[2J\n\u202e\x7f\udcff é 字") == r"a\x1b[2J\n\u202e\x7f\udcff é 字"


def test_a_plot_takes_no_name_for_mathematics(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that the font lacks
        figure: Figure = plot_quality([judged(r"$\foo$"), judged("_of the first")], "cpu")
        figure.savefig(tmp_path / "plot.png")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2
    assert plot_label("a$b") == r"a\$b"


def test_an_error_is_a_line_that_a_terminal_can_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("minilm-train", "no \x1b[31m\n such\tthing", 2) == 2
    assert capsys.readouterr().err == "minilm-train: error: no \\x1b[31m such thing\n"
    fail("minilm-train", f"begin {'a' * 100_000} end", 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < LONGEST_ERROR + 100
    assert line.startswith("minilm-train: error: begin aaa")
    assert line.endswith("aaa end")


def test_report_and_card_show_names_and_texts_of_the_data() -> None:
    agreement = METRICS["agreement"] | {"examples": [dict.fromkeys(("text", "teacher"), HOSTILE) | {"student": "# x"}]}
    metrics = METRICS | {
        "agreement": agreement,
        "teacher": METRICS["teacher"] | {"name": HOSTILE},
        "student": METRICS["student"] | {"name": HOSTILE},
        "data": METRICS["data"] | {"name": HOSTILE},
        "arguments": METRICS["arguments"] | {"teacher": "x\ntags: [y]"},
    }
    for told in (report_markdown(Path(HOSTILE), metrics), model_card(Path(HOSTILE), metrics)):
        text, count = re.subn(r"^```.*?^```$", "", told, flags=re.MULTILINE | re.DOTALL)  # repr is in these
        assert count >= 1
        assert SHOWN in text
        for sign in ("<b>", "\x1b", "\u202e", " *z", "$y", "[l]"):
            assert sign not in text.replace("\\", "\\\\") or f"\\{sign.strip()}" in text
        assert "\x1b" not in told
        assert "\u202e" not in told
    assert f"- {SHOWN}\n  - teacher: {SHOWN}\n  - student: \\# x\n" in report_markdown(Path("out"), metrics)
    assert "base_model" not in model_card(Path("out"), metrics)
    assert "\x1b" not in overview(metrics)
    assert len(overview(metrics).splitlines()) == len(overview(METRICS).splitlines())


def test_the_table_of_an_evaluation_keeps_its_columns() -> None:
    lines = [*results_table([judged(HOSTILE)]), *all_scores([judged(HOSTILE)])]
    for rows, columns in ((lines[:3], 6), (lines[3:], 2)):
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {columns + 1}
