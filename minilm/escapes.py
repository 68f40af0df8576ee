"""Names and texts of others as a terminal, Markdown and a plot show them, and as none of them obeys them."""

import re

# What Markdown, HTML within it and GitHub's mathematics read; an underscore within a word is none of these.
_SIGNS = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")
_BEGINNING = re.compile(r"(#+(?=\s|$)|[-+=](?=[-+=\s]|$)|\d+(?=[.)](\s|$)))")  # of a line: a heading, a list


def printable(text: str) -> str:
    """In a line: characters that a terminal would obey or not show are escapes, as repr has them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def markdown(text: str) -> str:
    """In a line of Markdown that shows the text as it is."""
    return _escape_beginning(_SIGNS.sub(r"\\\g<0>", printable(text)))


def plot_label(text: str) -> str:
    """As matplotlib shows it: no mathematics, and a legend leaves out what begins with an underscore."""
    return re.sub("^_", " _", printable(text).replace("$", r"\$"))


def _escape_beginning(text: str) -> str:
    match = _BEGINNING.match(text)
    if match is None:
        return text
    number = match[1].isdecimal()
    return f"{match[1]}\\{text[match.end() :]}" if number else f"\\{text}"
