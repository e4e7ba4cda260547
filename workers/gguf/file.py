"""The GGUF container: metadata, the table of tensors, their values as float32.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Every length is
checked against the file before it is used, so that a file that was cut off is named as such; gguf-py, whose reader
takes seconds for a vocabulary, turns quantized blocks into numbers.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from protocol.errors import StartError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors' data, unless general.alignment says otherwise
MAX_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. ``shape`` is in torch's order (the last dimension is contiguous)."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # byte of the file
    size: int  # in bytes


class GgufFile:
    """An open GGUF file. StartError, which names the file and the reason, for one that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise StartError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:  # an empty file cannot be mapped
            raise self.broken("it is empty") from None
        self.metadata: dict[str, Any] = {}
        self.tensors: list[Tensor] = []
        try:
            self._read_header()
        except (struct.error, IndexError):
            raise self.broken("it is cut off within its header; fetch it again") from None
        except (UnicodeDecodeError, OverflowError, ValueError) as error:
            raise self.broken(f"its header makes no sense ({error})") from None

    def broken(self, reason: str) -> StartError:
        return StartError(f"{self.path}: not a usable GGUF file: {reason}")

    def values(self, tensor: Tensor) -> np.ndarray:
        """float32 of ``tensor.shape``; quantized blocks are dequantized. A copy, not a view of the file."""
        raw = np.frombuffer(self._map, np.uint8, tensor.size, tensor.start)
        if tensor.kind in PLAIN:
            numbers: np.ndarray = raw.view(PLAIN[tensor.kind]).astype(np.float32)
            return numbers.reshape(tensor.shape)
        try:
            rows = raw.reshape(*tensor.shape[:-1], -1)
            return np.array(dequantize(rows, tensor.kind), np.float32).reshape(tensor.shape)
        except NotImplementedError:
            raise StartError(
                f"{self.path}: tensor {tensor.name} is stored as {tensor.kind.name}, which gguf-py cannot turn into "
                "numbers; use a file of another quantization"
            ) from None

    # -------------------------------------------------------------- the header

    def _read_header(self) -> None:
        if self._map[:4] != MAGIC:
            raise self.broken("it does not begin with GGUF")
        version, tensor_count, entry_count = struct.unpack_from("<IQQ", self._map, 4)
        if version not in VERSIONS:
            raise self.broken(f"it is of version {version}, and versions 2 and 3 (little-endian) are read")
        self._at = 24
        for _ in range(entry_count):
            key = self._string()
            (kind,) = self._take("<I")
            self.metadata[key] = self._value(kind)
        table = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = int(self.metadata.get("general.alignment", ALIGNMENT)) or ALIGNMENT
        data_start = -(-self._at // alignment) * alignment
        self.tensors = [self._placed(data_start, *entry) for entry in table]

    def _placed(self, data_start: int, name: str, shape: tuple[int, ...], code: int, offset: int) -> Tensor:
        """A row of the table as a tensor, its extent checked against the file's length."""
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise StartError(
                f"{self.path}: tensor {name} has the unknown type {code}; a newer gguf package may know it"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block or not all(shape):
            raise self.broken(f"tensor {name} of shape {list(shape)} does not consist of whole {kind.name} blocks")
        size = math.prod(shape) // block * block_bytes
        start = data_start + offset
        if start + size > len(self._map):
            missing = start + size - len(self._map)
            raise self.broken(f"it is cut off: tensor {name} ends {missing:,} bytes beyond its end; fetch it again")
        return Tensor(name, shape, kind, start, size)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch's order, type, offset in the data section)."""
        name = self._string()
        (dimensions,) = self._take("<I")
        if dimensions > MAX_DIMENSIONS:
            raise self.broken(f"tensor {name} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
        shape = self._take(f"<{dimensions}Q")
        code, offset = self._take("<IQ")
        return name, tuple(reversed(shape)), code, offset

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if length > len(self._map) - self._at:
            raise IndexError
        self._at += length
        return self._map[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        """A metadata value: number, bool, string, or a list of such."""
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._take("<" + SCALARS[kind])[0]
        if kind == ARRAY:
            element, count = self._take("<IQ")
            if count > len(self._map) - self._at:  # an element has at least a byte
                raise IndexError
            return list(self._elements(element, count))
        raise self.broken(f"a metadata value has the unknown type {kind}")

    def _elements(self, kind: int, count: int) -> Iterator[Any]:
        if kind in SCALARS:
            return iter(self._take(f"<{count}{SCALARS[kind]}"))
        if kind == STRING:
            return (self._string() for _ in range(count))
        raise self.broken(f"a metadata array has elements of the unknown type {kind}")
