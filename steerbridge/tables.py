"""Rows of tables as dicts: CSV, Parquet, datasets that `datasets` saved to disk.

`datasets` itself is not needed: what it saves are Arrow files beside a `state.json`.
"""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path
from typing import Any

from steerbridge import _json
from steerbridge.errors import BrokenPackage, DataError, Problem
from steerbridge.registry import requires


def separated(path: Path) -> list[dict[str, Any]]:
    """Rows of a table with a header; cells that are empty count as absent."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    return [_typed({k: v for k, v in row.items() if k and v}) for row in rows]


_LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """A label from its word, images from their list; `harmful` of an aligned pair is a text."""
    if "harmless" not in row and "harmful" in row:
        row["harmful"] = _LABELS.get(row["harmful"].lower(), row["harmful"])
    if "images" in row:
        row["images"] = row["images"].split(";")
    return row


def _arrow(name: str) -> Any:
    with requires("eval"):
        return import_module(name)


def parquet(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file.

    Raises:
        DataError: it is none.
        RuntimeMissing: without pyarrow.
    """
    with path.open("rb"):  # a clear error if there is none
        pass
    arrow, reader = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    try:
        return _present(reader.read_table(path))
    except arrow.ArrowException as error:
        raise DataError(Problem("file", "a Parquet file", str(error)), path) from error


def saved_dataset(path: Path) -> list[dict[str, Any]]:
    """Rows of the Arrow files that `state.json` names, in order.

    Raises:
        DataError: a file that is missing or broken.
        RuntimeMissing: without pyarrow.
    """
    arrow, ipc = _arrow("pyarrow"), _arrow("pyarrow.ipc")
    try:
        state = _json.loads((path / "state.json").read_bytes(), "state.json")
        names = [str(one["filename"]) for one in state["_data_files"]]
        tables = [ipc.open_stream(path / name).read_all() for name in names]
        return _present(arrow.concat_tables(tables))
    except BrokenPackage as error:
        raise DataError(error.problem, path) from error
    except (KeyError, TypeError, OSError, arrow.ArrowException) as error:
        raise DataError(Problem("state.json", "a saved dataset", repr(error)), path) from error


def _present(table: Any) -> list[dict[str, Any]]:
    """Rows of a table without what is null."""
    return [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
