"""Files of prompts as rows: what a file is, is seen in its bytes, not in its name.

gzip, bzip2 and xz are unpacked. Parquet, JSON arrays, JSON Lines and tables with a header (comma,
tab or semicolon) are told apart by how they begin; a `.txt` file holds one prompt a line. Text is
UTF-8, or UTF-16 or UTF-32 with a byte order mark; any other encoding must be said.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from steerbridge import _json
from steerbridge.datasets import tables
from steerbridge.errors import BrokenPackage, DataError, Problem

Row = dict[str, Any]

_KINDS: Final = "JSON, JSON Lines, CSV or Parquet"
MAX_BYTES: Final = 2 << 30  # of a file, and of what it unpacks to
_PACKED: Final[tuple[tuple[bytes, Any], ...]] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
)
# Longer marks first: that of UTF-16 begins that of UTF-32.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a file, what is absent left out, and where each one stands in it."""

    path: Path
    rows: Sequence[Row]
    where: Sequence[str]  # "line 3", "row 2"
    columns: Sequence[str]  # in order of appearance, those without a value too


def _table(path: Path, rows: Sequence[Row], where: Sequence[str]) -> Table:
    """A table of rows as they stand in a file, what is null still in them."""
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    present = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return Table(path, present, where, columns)


def read(path: Path, encoding: str | None = None) -> Table:
    """The rows of a file, of a part of it (`FILE#PART`), or of a dataset that was saved to disk.

    Args:
        encoding: of a text; None: as its bytes say.

    Raises:
        DataError: names the line and what is wrong with it.
        RuntimeMissing: Parquet or a saved dataset without pyarrow (extra `eval`).
        FileNotFoundError: there is no such file.
    """
    path, part = _parted(path)
    if path.is_dir():
        return _numbered(path, tables.saved_dataset(path))
    data = _unpacked(path)
    if data.startswith(b"PAR1"):
        return _numbered(path, tables.parquet(data, path))
    text = _text(data, path, encoding)
    if _stem_suffix(path) == ".txt":
        return _lines(path, text, lambda line, _: {"prompt": line.strip()})
    if text.lstrip()[:1] in ("{", "["):
        return _json_rows(path, text, part)
    names, rows, lines = tables.separated(text, path)
    return Table(path, rows, [f"line {line}" for line in lines], names)


def _parted(path: Path) -> tuple[Path, str]:
    """`FILE#PART` as a file and the name of a part."""
    if not path.exists():
        whole, _, part = path.name.rpartition("#")
        if whole and path.with_name(whole).is_file():
            return path.with_name(whole), part
    return path, ""


def _stem_suffix(path: Path) -> str:
    """The suffix without that of a compressed file."""
    packed = path.suffix.lower() in (".gz", ".bz2", ".xz")
    return (Path(path.stem) if packed else path).suffix.lower()


def _numbered(path: Path, rows: Sequence[Row]) -> Table:
    return _table(path, rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _unpacked(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(8)
    opener = next((o for magic, o in _PACKED if start.startswith(magic)), None)
    if start.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        found = "an archive or a spreadsheet (save it as CSV)"
        raise DataError(Problem("file", _KINDS, found), path)
    try:
        with opener(path) if opener else path.open("rb") as file:
            data: bytes = file.read(MAX_BYTES + 1)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
        raise DataError(Problem("file", "a whole compressed file", str(error)), path) from error
    if len(data) > MAX_BYTES:
        raise DataError(Problem("file", f"at most {MAX_BYTES} bytes", "more"), path)
    return data


def _text(data: bytes, path: Path, encoding: str | None) -> str:
    marked = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), None)
    mark, name = marked or (b"", encoding or "utf-8")
    try:
        text = data[len(mark) :].decode(name)
    except LookupError as error:
        raise DataError(Problem("encoding", "one that Python knows", repr(name)), path) from error
    except UnicodeDecodeError as error:
        if encoding is None and b"\0" in data:
            raise DataError(Problem("file", _KINDS, "a binary file"), path) from error
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[len(mark) + error.start]:02x} in line {line}"
        want = f"text in {name} (say --encoding cp1252, or what it is)"
        raise DataError(Problem("file", want, found), path) from error
    if "\0" in text:
        want = "text without NUL (UTF-16 without a byte order mark? say --encoding utf-16-le)"
        raise DataError(Problem("file", want, f"NUL in line {_line(text, chr(0))}"), path)
    return text


def _line(text: str, what: str) -> int:
    return text.count("\n", 0, text.index(what)) + 1


def _lines(path: Path, text: str, parsed: Callable[[str, str], Any]) -> Table:
    """One row for each line that is not blank."""
    rows, where = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_object(parsed(line, f"line {number}"), path, f"line {number}"))
            where.append(f"line {number}")
    return _table(path, rows, where)


def _json_rows(path: Path, text: str, part: str) -> Table:
    """JSON Lines; an array of objects; an object of objects; an object whose parts are arrays."""
    first, _, after = text.strip().partition("\n")
    if text.lstrip()[0] == "{" and after and _parses(first):
        return _lines(path, text, lambda line, where: _parsed(line, path, where))
    value = _parsed(text, path, "file")
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if part not in value:
            want = "one of its parts: " + ", ".join(f"{path.name}#{name}" for name in value)
            raise DataError(Problem("file", want, part or "all of them"), path)
        return _array(path, value[part], f"{part} ")
    if part:
        raise DataError(Problem("file", f"a part {part}", "a file without parts"), path)
    if isinstance(value, list):
        return _array(path, value, "")
    if value and all(isinstance(v, dict) for v in value.values()):
        return _table(path, list(value.values()), [f"key {key}" for key in value])
    return _table(path, [value], ["line 1"])


def _array(path: Path, values: list[Any], before: str) -> Table:
    where = [f"{before}row {number}" for number in range(1, len(values) + 1)]
    rows = [_object(value, path, name) for value, name in zip(values, where, strict=True)]
    return _table(path, rows, where)


def _parses(line: str) -> bool:
    try:
        _json.loads(line.encode(), "line")
    except BrokenPackage:
        return False
    return True


def _parsed(text: str, path: Path, where: str) -> Any:
    try:
        return _json.loads(text.encode("utf-8", "surrogatepass"), where, MAX_BYTES)
    except BrokenPackage as error:
        raise DataError(error.problem, path) from error


def _object(value: Any, path: Path, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(Problem(where, "a JSON object", type(value).__name__), path)
    row: Row = value
    return row


IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def images(folder: Path) -> list[Path]:
    """The image files of a folder and of the folders in it, in order."""
    return [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
