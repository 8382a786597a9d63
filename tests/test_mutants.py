"""The list of mutants, and docs/testing.md, which shows what found them: both fit the code."""

import re

import pytest
from mutants import MUTANTS, ROOT, TABLE

DOCUMENT = (ROOT / "docs/testing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.what}")
def test_a_mutant_fits_its_file(mutant):
    """Its text is there exactly once, and what replaces it is other code that Python reads."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.source() != source
    compile(mutant.source(), mutant.file, "exec")
    assert all((ROOT / path).exists() for path in mutant.paths())


def test_the_document_has_every_mutant_and_no_other():
    found = [line.split(" | ")[:2] for line in TABLE.search(DOCUMENT)[0].splitlines()[2:]]
    assert found == [[f"| `{m.file}`", m.what] for m in MUTANTS]
    assert not re.search("not found|time limit", TABLE.search(DOCUMENT)[0])


def test_the_tests_that_the_document_names_exist():
    """Of the map from claims to tests, and of the mutants; and every test file is named."""
    names = set(re.findall(r"`([\w/]+\.py)::(\w+)`", DOCUMENT))
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file, _ in names}
    assert len(names) > 40
    assert [name for file, name in sorted(names) if f"\ndef {name}(" not in sources[file]] == []
    files = ["test_cp_head.py", *(f"tests/{path.name}" for path in ROOT.glob("tests/test_*.py"))]
    missing = [file for file in files if f"| `{file}` |" not in DOCUMENT]
    assert not missing, f"docs/testing.md has no row for {missing}"
