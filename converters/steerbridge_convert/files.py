"""Common file types; a malformed file always raises `UnreadableSource`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from steerbridge import encodings, gguf_file
from steerbridge.errors import BrokenPackage
from steerbridge.format import FLOAT32_MAX, shown, unreadable
from steerbridge.tensors import Tensor

GGUF_DESCRIPTIVE: Final = ("general.", "GGUF.")  # prefixes of keys that change nothing
MAX_JSON: Final = 1 << 26  # bytes
MAX_JSON_PARTS: Final = 2_200_000  # values: those of the vectors of a model of 405 billion weights


def gguf(path: Path) -> gguf_file.GgufFile:
    """Open a GGUF file, memory-mapped.

    Raises:
        UnreadableSource: malformed.
    """
    try:
        return gguf_file.read(path)
    except BrokenPackage as error:
        raise unreadable(
            path, error.problem.field, error.problem.want, error.problem.got
        ) from error


def gguf_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a GGUF file; empty for any other path.

    Raises:
        UnreadableSource: malformed.
    """
    if not path.is_file() or path.suffix != ".gguf":
        return {}
    return gguf(path).metadata


def safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, memory-mapped.

    Raises:
        UnreadableSource: missing, malformed, or of a type other than F32, F16 and BF16.
    """
    if not path.is_file():
        raise unreadable(path.parent, path.name, "a file", "none")
    try:
        return encodings.map_safetensors(path)
    except BrokenPackage as error:
        raise unreadable(
            path, error.problem.field, error.problem.want, error.problem.got
        ) from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself, beside its tensors.

    Raises:
        UnreadableSource: malformed.
    """
    try:
        with safe_open(path, "numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "file", "a safetensors file", error) from error


def number(value: Any, field: str, path: Path) -> float:
    """A number of a foreign file, within the range of float32.

    Raises:
        UnreadableSource: anything else.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= FLOAT32_MAX
    ):
        raise unreadable(path, field, "a finite number", shown(value))
    return float(value)


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        UnreadableSource: missing, too large, not JSON, or not an object.
    """
    if not path.is_file():
        raise unreadable(path.parent, path.name, "a file", "none")
    if path.stat().st_size > MAX_JSON:
        raise unreadable(path, "size", f"at most {MAX_JSON} bytes", path.stat().st_size)
    text = path.read_bytes()
    # A value takes up to a hundred bytes as an object, and two as text.
    if (parts := sum(map(text.count, (b",", b"[", b"{")))) > MAX_JSON_PARTS:
        raise unreadable(path, "file", f"at most {MAX_JSON_PARTS} values", parts)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, "file", "JSON", error) from error
    if not isinstance(value, dict):
        raise unreadable(path, "file", "a JSON object", type(value).__name__)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"a number, found {name}")
