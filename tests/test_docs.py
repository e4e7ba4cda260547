"""The documents: files that they name exist, links lead somewhere, lines are short, words are those in use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_LINE = 120
PLACES = ("", "docs/**/", "deploy/**/", "examples/**/", ".github/**/")
PAGES = sorted(page for place in PLACES for page in ROOT.glob(f"{place}*.md"))
FOLDERS = "protocol|gateway|scheduler|workers|headrace|tests|benchmarks|deploy|docs|examples"
SOURCES = {path.name for top in FOLDERS.split("|") for path in (ROOT / top).rglob("*.*")} | {"setup.py"}
# A word of the code's early days -> the one in use now (docs/architecture.md, section 2).
OLD_WORDS = {
    r"\breigns?\b": "term",
    r"\bincarnations?\b": "session",
    r"\bledgers?\b": "lifecycle",
    r"\bshortcuts?\b": "whole pass",
    r"\bsteers?\b": "logits processors",
    r"\blanes?\b": "worker state",
    r"\bpulses?\b": "heartbeat",
}
SUFFIXES = {".py", ".lua", ".cpp", ".inc", ".sh", ".yaml", ".toml", ".json"}  # metrics and alerts among them
DATA = ("examples/demo-model/", "tests/clients/node/")


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_files_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*|\.(?:github|ci|pre-commit)[\w./-]*)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name
    for name in re.findall(r"\b\w+\.(?:py|lua|inc)\b", text):  # wherever it lies: text often names it alone
        assert "NAME" in name or name in SOURCES, name
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_lines_are_short(path: Path) -> None:
    """Tables and lines that hold little but a link may be longer."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if len(line) > LONGEST_LINE and not line.startswith("|"):
            assert "](" in line, f"{page(path)}:{number} has {len(line)} characters"
            bare = re.sub(r"\]\([^)]*\)", "]", line)
            assert len(bare) <= LONGEST_LINE, f"{page(path)}:{number} has {len(bare)} characters without its links"


def test_pages_and_code_use_the_words_of_today() -> None:
    sources = (path for top in FOLDERS.split("|") for path in (ROOT / top).rglob("*") if path.suffix in SUFFIXES)
    paths = [p for p in (*PAGES, *sources) if p != Path(__file__) and not page(p).startswith(DATA)]
    assert len(paths) > 400
    said = [
        f"{page(path)}:{number} says {found.group()!r}: say {new!r}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for old, new in OLD_WORDS.items()
        if (found := re.search(old, line.replace("_", " "), re.IGNORECASE))
    ]
    assert not said, said


def test_every_file_that_the_design_lists_exists() -> None:
    """The map of section 1 of the architecture. A file that it does not list yet is not an error."""
    text = (ROOT / "docs/architecture.md").read_text()
    listed = text.partition("## 1. ")[2].partition("```\n")[2].partition("\ntests/")[0]
    folders: dict[int, str] = {}  # by indent; a deeper one lies in the shallower ones before it
    count = 0
    for line in listed.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = {depth: name for depth, name in folders.items() if depth < indent}
        if found := re.match(r"\s*(\w+/)\s", line):
            folders[indent] = found[1]
        for name in re.findall(r"\b\w+\.py\b", line):
            assert ROOT.joinpath(*folders.values(), name).is_file(), line
            count += 1
    assert count > 80
