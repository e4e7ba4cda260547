"""Where each key of a TOML document stands. The standard library's parser gives values without their lines.

The scanner only needs to know where a value ends, so that what is written inside of a string or an array is not taken
for a key. Keys within inline tables and arrays have the line of the key that they belong to.
"""

from __future__ import annotations

import re

Path = tuple[str | int, ...]

_PART = r"[A-Za-z0-9_-]+|\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'"
_KEY = re.compile(rf"[ \t]*((?:{_PART})(?:[ \t]*\.[ \t]*(?:{_PART}))*)[ \t]*=")
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*((?:{_PART})(?:[ \t]*\.[ \t]*(?:{_PART}))*)[ \t]*\]")
_PARTS = re.compile(_PART)
_VALUE = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*"{3,5}' r"|'''(?:[^']|'(?!''))*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'" r"|#[^\n]*|[\[{\]}]|\n",
    re.DOTALL,
)  # fmt: skip


def key_lines(text: str) -> dict[Path, int]:
    """Path of each table and key -> its line, from 1. An element of an array of tables has its number in the path."""
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}  # arrays of tables -> elements so far
    table: Path = ()
    at, line = 0, 1
    while at < len(text):
        if header := _HEADER.match(text, at):
            table = _within(counts, _parts(header.group(2)), header.group(1) == "[[")
            found.setdefault(table, line)
            end = text.find("\n", at)
            end = len(text) if end < 0 else end + 1
        else:
            key = _KEY.match(text, at)
            if key:
                found.setdefault((*table, *_parts(key.group(1))), line)
            end = _end_of_value(text, key.end() if key else at)
        line += text.count("\n", at, end)
        at = end
    return found


def line_of(lines: dict[Path, int], path: Path) -> int | None:
    """The line of ``path``, or of the nearest key that it lies in."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def shown(path: Path) -> str:
    """``models.small.workers``, ``routes.auto.rules[1].words``; parts that TOML quotes are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part + 1}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"')
    return text


def _parts(dotted: str) -> Path:
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in _PARTS.findall(dotted))


def _within(counts: dict[Path, int], name: Path, element: bool) -> Path:
    """The path of a table by its header: a name that passes through an array of tables means its last element."""
    path: Path = ()
    for index, part in enumerate(name):
        path = (*path, part)
        last = index == len(name) - 1
        if last and element:
            counts[path] = counts.get(path, 0) + 1
        if path in counts:
            path = (*path, counts[path] - 1)
    return path


def _end_of_value(text: str, at: int) -> int:
    """Behind the end of the line on which the value ends."""
    depth = 0
    for token in _VALUE.finditer(text, at):
        match token.group():
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
            case "\n" if depth <= 0:
                return token.end()
    return len(text)
