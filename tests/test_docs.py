"""The documents quote code that exists."""

import re

import pytest

from model import ROOT


def quoted(text):
    """(line, file) of the proof table of docs/exactness.md, whose head names the file."""
    rows = [row.strip("|").split(" | ") for row in re.findall(r"^\|.*\|$", text, flags=re.M)]
    file, = re.findall(r"the line in `([\w/.]+)`", rows[0][-1])
    return [(line, file) for row in rows[2:] for line in re.findall(r"^\s*`(.+)`\s*$", row[-1])]


def missing(quotes):
    """Those that do not begin a line of their file."""
    lines = {file: [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
             for _, file in quotes}
    return [quote for quote, file in quotes if not any(
        line == quote or line.startswith(f"{quote}  #") for line in lines[file])]


def test_the_proof_table_quotes_lines_of_the_code():
    """Word for word; a comment may follow. This test can fail."""
    quotes = quoted((ROOT / "docs/exactness.md").read_text(encoding="utf-8"))
    assert len(quotes) == 7
    assert missing(quotes) == []
    assert missing([("heads = bernoulli(m / (m + 1 - keep), generator)", "decode.py"),
                    ("m = rest.sum", "decode.py")]) == ["heads = bernoulli(m / (m + 1 - keep), generator)", "m = rest.sum"]


@pytest.mark.parametrize("document", ["docs/exactness.md", "docs/faq.md", "docs/results.md", "course/exercises.md"])
def test_files_that_a_document_names_are_there(document):
    """Our own ones, in code or as a link; what a command writes, or a reader is to write, is none of them."""
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)`", text)
    linked = [(ROOT / document).parent / path for path in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]+)?\)", text)]
    assert named and not [name for name in named if not (ROOT / name).exists() and "yours" not in name]
    assert [path for path in linked if not path.exists()] == []
