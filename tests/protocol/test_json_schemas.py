"""Of some three hundred schemas three quarters are served, and the rest refused with keyword and path."""

from __future__ import annotations

import datetime
import itertools
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from protocol.errors import InvalidRequest, StructureNotSupported
from protocol.structures.grammar import Grammars, MaskRow, TokenVocabulary
from protocol.structures.json_schema import FORMAT_PATTERNS, MAX_CLASSES, REFUSED, library_options
from protocol.structures.structure import Structure
from tests.protocol.json_schemas import refused, schemas

END = 256
SERVED, REFUSALS = schemas(), list(refused())


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TokenVocabulary([bytes([i]) for i in range(256)] + [b""], [END]), END + 1, [END])


def test_there_are_enough_and_they_are_valid() -> None:
    every = [schema for _, schema in SERVED] + [schema for _, schema, *_ in REFUSALS]
    for schema in every:
        Draft202012Validator.check_schema(schema)
    assert len(every) >= 300
    assert len(SERVED) >= 0.75 * len(every)


def test_they_are_served(grammars: Grammars) -> None:
    failed: dict[str, str] = {}
    for name, schema in SERVED:
        structure = Structure(json=schema)
        try:
            structure.check()
            grammars.check(structure)
        except StructureNotSupported as reason:
            failed[name] = str(reason)
    assert not failed


@pytest.mark.parametrize(("name", "schema", "keyword", "path"), REFUSALS, ids=[name for name, *_ in REFUSALS])
def test_is_refused_by_keyword_and_path(grammars: Grammars, name: str, schema: Any, keyword: str, path: str) -> None:
    structure = Structure(json=schema)

    def check() -> None:
        structure.check()
        grammars.check(structure)

    with pytest.raises(StructureNotSupported) as caught:
        check()
    assert f"the keyword {keyword} at {path} cannot be served" in str(caught.value)
    if keyword in REFUSED:  # at once, without the library
        with pytest.raises(StructureNotSupported):
            structure.check()


def admits(grammars: Grammars, schema: Any, text: str) -> bool:
    matcher, row = grammars.matcher(Structure(json=schema)), MaskRow(grammars.words)
    for byte in [*text.encode(), END]:
        matcher.fill(row)
        if not int(row.bits[byte >> 5]) >> (byte & 31) & 1:
            return False
        matcher.advance_one(byte)
    return True


@pytest.mark.parametrize("year", [1, 4, 100, 400, 1900, 2000, 2023, 2024, 9999])
def test_dates_are_those_of_the_calendar(year: int) -> None:
    pattern = re.compile(FORMAT_PATTERNS["date"])
    for month, day in itertools.product(range(14), range(33)):
        text = f"{year:04}-{month:02}-{day:02}"
        try:
            there_is = bool(datetime.date.fromisoformat(text))
        except ValueError:
            there_is = False
        assert bool(pattern.match(text)) == there_is, text


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"2024-2-1"']),
        ({"type": "string", "format": "time"}, ['"09:10:15Z"', '"09:10:15.25+02:00"'], ['"09:10:15z"', '"09:10:60Z"']),
        ({"format": "date-time"}, ['"2024-02-29T10:00:00Z"', "5"], ['"2024-02-29t10:00:00Z"', '"2024-02-29"']),
        ({"type": ["string", "null"], "format": "date", "pattern": "^2"}, ["null", '"2001-01-01"'], ['"1999-01-01"']),
        ({"type": "string", "pattern": '^[^"]*$'}, ['"a"', r'"\\"'], [r'"\""', r'"a\"b"']),
        ({"type": "string", "pattern": r'^[^"\\]*$'}, ['"a"', r'"\n"'], [r'"\""', r'"\\"']),
        ({"type": "string", "pattern": "^[^!-~]*$"}, ['" "'], [r'"\""', '"a"']),
        ({"type": "string", "pattern": "^[^a]*$"}, [r'"\""', r'"\\"'], ['"a"']),
        ({"type": "number", "exclusiveMaximum": 0}, ["-0.5", "-3"], ["-0", "-0.0", "0"]),
        ({"type": "integer", "exclusiveMaximum": 0, "minimum": -3}, ["-3", "-1"], ["-0", "0", "-4"]),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.1"], ["0", "0.0", "-0"]),
    ],
)
def test_edges(grammars: Grammars, schema: Any, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not admits(grammars, schema, text)] == []
    assert [text for text in bad if admits(grammars, schema, text)] == []


@pytest.mark.parametrize(
    ("pattern", "escapes"),
    [
        ("[^a]x[^b]", None),
        ('[^"]', "bfnrt\\"),
        (r"[^\\]", 'bfnrt"'),
        ("[^" * 32_000, "bfnrt"),  # has no end
        ("[^" * 32_000 + "\\", "bfnrt"),
        ("".join(f"[^{chr(0x4E00 + i)}]" for i in range(MAX_CLASSES + 1)), "bfnrt"),  # taken for what is stricter
    ],
)
def test_escapes_that_negated_classes_exclude(pattern: str, escapes: str | None) -> None:
    options = library_options({"type": "array", "items": {"pattern": pattern}})
    assert options.get("json_allowed_escapes") == escapes


@pytest.mark.parametrize("wrong", [{"format": ["date"]}, {"exclusiveMaximum": 0, "maximum": "1"}, {"maximum": {}}])
def test_keywords_of_another_type_are_refused(grammars: Grammars, wrong: dict[str, Any]) -> None:
    structure = Structure(json={"type": "number", **wrong})

    def check() -> None:
        structure.check()
        grammars.check(structure)

    with pytest.raises(InvalidRequest) as caught:
        check()
    assert caught.value.param == "structure"
