"""The structure of the code: no import circles, no crowded folder, and the ways of a block and of a token are short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import structure, token_way
from tests.long import LONG


def test_no_module_reaches_itself() -> None:
    assert structure.circles(structure.arrows()) == []


def test_a_circle_is_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert structure.circles(graph) == [["a", "b", "c"]]


def test_no_folder_is_crowded() -> None:
    assert {folder: count for folder, count in structure.folders().items() if count > structure.MOST_FILES} == {}


def test_a_long_file_says_why() -> None:
    assert structure.long_files() == [], f"over {structure.MOST_LINES} lines: split it, or say why in its first lines"


def test_a_block_changes_hands_in_at_most_four_files() -> None:
    assert len(structure.block_way()) <= 4


@pytest.mark.timeout(600)
def test_a_tokens_way_is_short_and_documented(tmp_path: Path) -> None:
    """From the sampler to the reader's socket, on running processes."""
    way = token_way.trace(tmp_path, str(structure.ROOT / "examples" / "demo-model"))
    assert len(way) <= token_way.MOST_FILES, sorted(way)
    page = (structure.ROOT / "docs" / "tour.md").read_text()
    assert [file for file in sorted(way) if file not in page] == [], "docs/tour.md lists the files of a token's way"


def test_each_long_test_is_there() -> None:
    for name in LONG:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (structure.ROOT / file).read_text(), name
