"""The structure of the code, counted: import circles, files per folder, long files, arrows, a block's owners.

    python -m tests.structure

Imports count wherever they stand: at the top, inside functions, and under TYPE_CHECKING. The way of a token is found by
running (tests/token_way.py), since calls between processes are not imports.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "headrace", "protocol", "scheduler", "workers")
MOST_FILES = 16  # Python files in one folder
MOST_LINES = 400  # of a file whose head does not say why it has more
# what gives a block to a sequence, shares it, or takes it back
BLOCK_CHANGES = re.compile(r"\bblocks\.(start|take|publish|release)\(|\bsequence\.blocks( =|\.append)")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of ours."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that the file imports. A package counts as what was asked of it where that is a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else node.module)
    return names & known.keys()


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected components of more than one), by Tarjan."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def folders() -> Counter[str]:
    """Python files by folder; an empty __init__.py is no room."""
    return Counter(
        str(path.parent.relative_to(ROOT))
        for path in modules().values()
        if path.name != "__init__.py" or path.stat().st_size
    )


def long_files() -> list[str]:
    """Files of Python, tests and benchmarks too, that have more than MOST_LINES lines and do not say why."""
    paths = [path for top in (*PACKAGES, "tests", "benchmarks", "examples") for path in (ROOT / top).rglob("*.py")]
    found = [path for path in paths if len(path.read_text().splitlines()) > MOST_LINES]
    return [str(path.relative_to(ROOT)) for path in found if not _says_why(path)]


def _says_why(path: Path) -> bool:
    head = ast.get_docstring(ast.parse(path.read_text())) or ""
    return f"{MOST_LINES} lines:" in head


def block_way() -> list[str]:
    """Files in which a KV block changes hands."""
    inside = [path for path in modules().values() if path.is_relative_to(ROOT / "scheduler")]
    return [str(path.relative_to(ROOT)) for path in inside if _changes_blocks(path)]


def _changes_blocks(path: Path) -> bool:
    return path.name == "blocks.py" or bool(BLOCK_CHANGES.search(path.read_text()))


def lines() -> Iterator[str]:
    graph = arrows()
    yield f"{len(graph)} modules, {sum(map(len, graph.values()))} arrows"
    found = circles(graph)
    yield f"{len(found)} circles" + "".join(f"\n  {' <-> '.join(group)}" for group in found)
    for folder, count in sorted(folders().items()):
        yield f"{count:4d} files in {folder}"
    long = long_files()
    yield f"{len(long)} files over {MOST_LINES} lines that do not say why" + "".join(f"\n  {path}" for path in long)
    yield "a block's way: " + ", ".join(block_way())


if __name__ == "__main__":
    print("\n".join(lines()))
