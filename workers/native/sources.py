"""Which sources a library was built from. Imports nothing but the standard library: setup.py runs it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def digest(folder: Path) -> str | None:
    """Of all native sources in ``folder``; None where there are none."""
    paths = sorted([*folder.glob("*.inc"), *folder.glob("*.cpp")])
    found = sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16] if paths else None
