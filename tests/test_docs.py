"""The documents: files that they name exist, links lead somewhere, lines are short, and they use the project's words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_LINE = 120
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md"), *ROOT.glob(".github/*.md")])
FOLDERS = "protocol|gateway|scheduler|workers|headrace|tests|benchmarks|deploy|docs|examples"
# A word of the code's early days -> the one in use now (docs/architecture.md, section 2).
OLD_WORDS = {
    r"\breigns?\b": "term",
    r"\bincarnations?\b": "session",
    r"\blanes?\b": "worker state",
    r"\bledgers?\b": "lifecycle",
    r"\bshortcuts?\b": "whole pass",
    r"\bsteers?\b": "logits processors",
    r"\b(?:assembly|core|inbox|fleet|leadership|pace|admit|device|term|ingest|reign)\.py\b": "the file's new name",
}


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_files_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*|\.\w[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_lines_are_short(path: Path) -> None:
    """Tables, code and lines that hold little but a link may be longer."""
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code ^= line.startswith("```")
        if len(line) > LONGEST_LINE and not code and not line.startswith(("|", "    ")):
            assert "](" in line, f"{page(path)}:{number} has {len(line)} characters"
            bare = re.sub(r"\]\([^)]*\)", "]", line)
            assert len(bare) <= LONGEST_LINE, f"{page(path)}:{number} has {len(bare)} characters without its links"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_pages_use_the_words_of_today(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for old, new in OLD_WORDS.items():
            found = re.search(old, line)
            assert not found, f"{page(path)}:{number} says {found and found.group()!r}: say {new!r}"


def test_the_design_lists_every_module_and_no_other() -> None:
    """Section 1 of the architecture names each Python file below the services' folders, but for package markers."""
    listed = (ROOT / "docs/architecture.md").read_text().partition("## 1. ")[2].partition("```\n")[2].partition("```")[0]
    named: set[str] = set()
    folder = ""
    for line in listed.splitlines():
        if found := re.match(r"(\s*)([\w/]+/)(?=\s|$)", line):
            folder = found[2]
        named |= {folder + name for name in re.findall(r"\b[\w/]+\.py\b", line)}
    services = ("protocol", "gateway", "scheduler", "workers", "headrace")
    there = {str(p.relative_to(ROOT)) for top in services for p in (ROOT / top).rglob("*.py") if "__" not in p.name}
    assert there - named == set()
    assert named - there == set()
