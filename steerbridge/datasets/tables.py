"""Tables with a header, Parquet, and datasets that `datasets` saved to disk, as rows.

A table whose rows do not have exactly the cells of its header is refused: an unquoted comma or a
lone quote would cut a prompt, lose a label or swallow rows without a word. `datasets` itself is not
needed: what it saves are Arrow files beside a `state.json`.
"""

from __future__ import annotations

import csv
import io
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from steerbridge import _json
from steerbridge.errors import BrokenPackage, DataError, Problem
from steerbridge.registry import requires

DELIMITERS: Final = ",\t;"
_LIMIT = threading.Lock()  # the csv module has one limit for all


def separated(text: str, path: Path) -> tuple[list[str], list[dict[str, str]], list[int]]:
    """The names of the columns of a table with a header, its rows without empty cells, and the line
    in which each begins.

    Raises:
        DataError: a header with empty or repeated names, a row with more or fewer cells than the
            header, a quote that is not closed or stands in the middle of a cell.
    """
    with _LIMIT:
        before = csv.field_size_limit(sys.maxsize)
        try:
            cells, lines = _cells(text, path)
        finally:
            csv.field_size_limit(before)
    if not cells:
        raise DataError(Problem("file", "at least one example", "none"), path)
    header, *rows = cells
    names = _names(header, rows, path)
    for row, line in zip(rows, lines[1:], strict=True):
        if len(row) != len(header):
            want = f"{len(header)} cells, as in the header (a cell with a comma is quoted)"
            raise DataError(Problem(f"line {line}", want, f"{len(row)}"), path)
    full = [
        {name: cell for name, cell in zip(names, row, strict=True) if name and cell.strip()}
        for row in rows
    ]
    return [name for name in names if name], full, lines[1:]


def _cells(text: str, path: Path) -> tuple[list[list[str]], list[int]]:
    """The cells of every row that is not blank, and the line in which the row begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    rows, lines, line = [], [], 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        want = "closed quotes, and none in the middle of a quoted cell (doubled they may stand)"
        raise DataError(Problem(f"line {line}", want, str(error)), path) from error
    return rows, lines


def _delimiter(text: str) -> str:
    """The one that the header holds most of; a header of one column has none."""
    header = text.lstrip().partition("\n")[0]
    return max(DELIMITERS, key=header.count)


def _names(header: list[str], rows: list[list[str]], path: Path) -> list[str]:
    """The names of the columns; empty for a first one that only counts rows, as pandas writes."""
    names = [name.strip() for name in header]
    counts = not names[0] and all(row and row[0].isdecimal() for row in rows)
    for i, name in enumerate(names):
        if not name and not (i == 0 and counts and len(names) > 1):
            raise DataError(Problem("header", "a name for every column", repr(header)), path)
        if names.index(name) != i:
            raise DataError(Problem("header", "every name once", f"{name} twice"), path)
    return names


def _arrow(name: str) -> Any:
    with requires("eval"):
        return import_module(name)


def parquet(data: bytes, path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file.

    Raises:
        DataError: it is none.
        RuntimeMissing: without pyarrow.
    """
    arrow, reader = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    try:
        return _rows(reader.read_table(arrow.BufferReader(data)))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(Problem("file", "a Parquet file", str(error)), path) from error


def saved_dataset(path: Path) -> list[dict[str, Any]]:
    """Rows of the Arrow files that `state.json` names, in order.

    Raises:
        DataError: a file that is missing or broken, or a dataset with splits.
        RuntimeMissing: without pyarrow.
    """
    if (path / "dataset_dict.json").is_file():
        want = "the folder of one of its splits"
        raise DataError(Problem("dataset", want, "a dataset with splits"), path)
    arrow, ipc = _arrow("pyarrow"), _arrow("pyarrow.ipc")
    try:
        state = _json.loads((path / "state.json").read_bytes(), "state.json")
        names = [str(one["filename"]) for one in state["_data_files"]]
        tables = [ipc.open_stream(path / name).read_all() for name in names]
        return _rows(arrow.concat_tables(tables))
    except BrokenPackage as error:
        raise DataError(error.problem, path) from error
    except (KeyError, TypeError, OSError, arrow.ArrowException) as error:
        raise DataError(Problem("state.json", "a saved dataset", repr(error)), path) from error


def _rows(table: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
