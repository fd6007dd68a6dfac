"""JSON as the package format allows it: no duplicate keys, no NaN, no lone surrogates.

Readers in other languages disagree about all three, and a document that two readers
understand differently is a way around a guard.
"""

from __future__ import annotations

import json
from typing import Any

from steerbridge.errors import BrokenPackage, Problem

MAX_BYTES = 16 << 20


def loads(data: bytes, what: str, limit: int = MAX_BYTES) -> Any:
    """Parse UTF-8 JSON of at most `limit` bytes.

    Raises:
        BrokenPackage: too large, not UTF-8, not JSON, duplicate keys, NaN or too deep.
    """
    if len(data) > limit:
        raise BrokenPackage(Problem(what, f"at most {limit} bytes", f"{len(data)} bytes"))
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        dumps(value)  # a lone surrogate escape parses but cannot be written back
    except (ValueError, RecursionError) as error:
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)
        raise BrokenPackage(Problem(what, "JSON in UTF-8", reason)) from error
    return value


def dumps(value: Any) -> bytes:
    """The one way a spec is written: two-space indent, UTF-8, keys in order of definition."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
