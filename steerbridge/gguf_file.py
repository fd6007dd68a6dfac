"""A bounded reader and an atomic writer for GGUF files of any content.

The reader is our own because files come from strangers: every count and length is checked
against the bytes that are there before anything is allocated or looped over, which
`gguf.GGUFReader` does not promise. Layout and names come from the gguf package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little
endian).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from steerbridge.errors import BrokenPackage, Problem

MAX_TENSORS: Final = 1 << 16
MAX_KEYS: Final = 1 << 16
MAX_NAME: Final = 1 << 16
MAX_ARRAY: Final = 1 << 24
MAX_DIMS: Final = 4

_SCALARS: Final = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<B",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as stored: `shape` in numpy order, `data` the raw bytes mapped from the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata and tensors of one GGUF file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """Reads forward through mapped bytes and refuses to pass their end."""

    def __init__(self, data: NDArray[np.uint8], path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def fail(self, field: str, want: str, got: object) -> BrokenPackage:
        return BrokenPackage(Problem(field, want, str(got)), self.path)

    def take(self, size: int, field: str) -> bytes:
        left = len(self.data) - self.at
        if size > left:
            raise self.fail(field, f"{size} more bytes", f"{left} before the end of the file")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, format: str, field: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format), field))[0]

    def count(self, limit: int, field: str, format: str = "<Q") -> int:
        value: int = self.number(format, field)
        if value > limit:
            raise self.fail(field, f"at most {limit}", value)
        return value

    def text(self, field: str, limit: int) -> str:
        raw = self.take(self.count(limit, f"{field} (length)"), field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(field, "UTF-8", error) from error


def read(path: Path) -> GgufFile:
    """Map a GGUF file.

    Raises:
        BrokenPackage: not GGUF, an unknown version, or counts, lengths, offsets or names
            that do not fit the file.
        OSError: the file cannot be opened.
    """
    if path.stat().st_size < 24:
        raise BrokenPackage(Problem("GGUF header", "24 bytes", "a shorter file"), path)
    cursor = _Cursor(np.memmap(path, np.uint8, "r"), path)
    if (magic := cursor.take(4, "magic")) != b"GGUF":
        raise cursor.fail("magic", "b'GGUF'", magic)
    if (version := cursor.number("<I", "version")) not in (2, 3):
        raise cursor.fail("version", "2 or 3, little endian", version)
    tensor_count = cursor.count(MAX_TENSORS, "tensor count")
    key_count = cursor.count(MAX_KEYS, "metadata count")
    metadata = _read_metadata(cursor, key_count)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise cursor.fail("general.alignment", "a multiple of 8 up to 1 MiB", alignment)
    infos = [_read_info(cursor, i) for i in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(metadata, _map_tensors(cursor, infos, start, alignment))


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = cursor.text(f"metadata key {i}", MAX_NAME)
        if key in metadata:
            raise cursor.fail("metadata key", "unique keys", repr(key))
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = _value_type(cursor, key)
    if kind == GGUFValueType.STRING:
        return cursor.text(key, len(cursor.data))
    if kind != GGUFValueType.ARRAY:
        return _scalar(cursor, kind, key)
    item = _value_type(cursor, key)
    if item == GGUFValueType.ARRAY:
        raise cursor.fail(key, "an array of scalars or strings", "nested arrays")
    length = cursor.count(MAX_ARRAY, f"{key} (length)")
    if item == GGUFValueType.STRING:
        # Each string takes at least its eight length bytes, so the loop ends with the file.
        return [cursor.text(key, len(cursor.data)) for _ in range(length)]
    dtype = np.dtype(_SCALARS[item])
    return np.frombuffer(cursor.take(length * dtype.itemsize, key), dtype).tolist()


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.number("<I", key)
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise cursor.fail(key, "a GGUF value type", number) from error


def _scalar(cursor: _Cursor, kind: GGUFValueType, key: str) -> Any:
    value = cursor.number(_SCALARS[kind], key)
    return bool(value) if kind == GGUFValueType.BOOL else value


_Info = tuple[str, GGMLQuantizationType, tuple[int, ...], int]


def _read_info(cursor: _Cursor, index: int) -> _Info:
    name = cursor.text(f"tensor name {index}", MAX_NAME)
    field = f"tensor {name!r}"
    dims = cursor.count(MAX_DIMS, f"{field} dimensions", "<I")
    shape = [cursor.count(1 << 40, f"{field} size") for _ in range(dims)]
    number = cursor.number("<I", field)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise cursor.fail(f"{field} type", "a known ggml type", number) from error
    return name, kind, tuple(reversed(shape)), cursor.number("<Q", field)


def _map_tensors(
    cursor: _Cursor, infos: list[_Info], start: int, alignment: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in infos:
        field = f"tensor {name!r}"
        if name in tensors:
            raise cursor.fail("tensor names", "unique names", repr(name))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise cursor.fail(f"{field} shape", f"rows of whole blocks of {block}", shape)
        size = math.prod(shape) // block * block_bytes
        if offset % alignment or start + offset + size > len(cursor.data):
            raise cursor.fail(
                f"{field} data", f"{size} aligned bytes inside the file", f"offset {offset}"
            )
        data = cursor.data[start + offset : start + offset + size]
        tensors[name] = GgufTensor(name, kind, shape, data)
    return tensors


def write(path: Path, architecture: str, fill: Callable[[GGUFWriter], None]) -> None:
    """Write a GGUF file at `path` (the caller renames it into place).

    `fill` adds metadata and tensors to the writer it is given.
    """
    writer = GGUFWriter(path, architecture)
    try:
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
