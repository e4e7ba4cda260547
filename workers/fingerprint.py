"""The fingerprint of what a worker runs: two workers with the same one continue each other's sequences.

It is a hash of the checkpoint's small files, of the names, sizes and headers of its safetensors, and of how they are
computed (dtype, quantization, dtype of keys and values). Reading all weights would take minutes where they are large,
and headers alone do not tell a fine-tuned model from its base: so a few bytes of every tensor are read too. An edit
that spares these bytes of all tensors is not noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from protocol.errors import StartError

FORM = 1  # counts changes of what is hashed, so that a new form never equals an old one by chance
SAMPLE_BYTES = 256  # read of each tensor, from its middle: embeddings often begin with rows that training never touches
MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound
MAX_SMALL_BYTES = 256 << 20
INDEX = "model.safetensors.index.json"
SMALL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


def fingerprint(directory: Path | None, computed: Mapping[str, str]) -> str:
    """sha256, 64 hex digits, of the checkpoint in ``directory`` (None: none) and of how it is ``computed``.

    StartError if a file cannot be read."""
    digest = hashlib.sha256(f"headrace {FORM}\n".encode())
    digest.update(json.dumps(dict(computed), sort_keys=True).encode())
    try:
        for path in _small_files(directory) if directory is not None else ():
            _note(digest, path.name, path.stat().st_size)
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for path in weight_files(directory) if directory is not None else ():
            _note(digest, path.name, path.stat().st_size)
            with path.open("rb") as file:
                _hash_tensors(digest, file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(f"{directory}: cannot be read for its fingerprint: {type(error).__name__}") from error
    return digest.hexdigest()


def _note(digest: Any, name: str, size: int) -> None:
    digest.update(f"{name}\0{size}\0".encode())


def _small_files(directory: Path) -> Iterable[Path]:
    for name in SMALL:
        path = directory / name
        if path.is_file() and path.stat().st_size <= MAX_SMALL_BYTES:
            yield path


def weight_files(directory: Path) -> list[Path]:
    """The safetensors that transformers would load: those of the index, else all that are there."""
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [directory / name for name in names]
    return sorted(directory.glob("*.safetensors"))


def _hash_tensors(digest: Any, file: BinaryIO) -> None:
    """The header (8 bytes of length, then JSON: names, types, shapes, places) and some bytes of each tensor."""
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= MAX_HEADER_BYTES:
        raise ValueError("no safetensors header")
    header = file.read(size)
    digest.update(header)
    places = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    for begin, end in sorted(places):
        count = min(SAMPLE_BYTES, end - begin)
        file.seek(8 + size + (begin + end - count) // 2)
        digest.update(file.read(count))
