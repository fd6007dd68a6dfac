"""Rows with columns of our own, or with columns that the user names, as examples.

Nothing is labelled by default: the label is in the file or said by the user, for every row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from steerbridge.data import Example
from steerbridge.datasets.files import Row, Table
from steerbridge.errors import DataError, Problem

FIELDS: Final = ("prompt", "harmful", "harmless", "kind", "pair", "group", "system", "images")
_YES: Final = {
    **dict.fromkeys(("true", "1", "1.0", "yes"), True),
    **dict.fromkeys(("false", "0", "0.0", "no"), False),
}
_SHOWN: Final = 5  # values named in an error


@dataclass(frozen=True, slots=True)
class Said:
    """What the user says of a file.

    Args:
        label: of every row: harmful or not; None: it is in the file.
        columns: field -> the column it is in, or for `harmful` and `harmless` COLUMN:VALUE,VALUE.
        encoding: of a text; None: as its bytes say.
    """

    label: bool | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    encoding: str | None = None


def examples(table: Table, said: Said) -> list[Example]:
    """Every row as one example, or as the two sides of an aligned pair.

    Raises:
        DataError: names the row and column that cannot be used, or the columns found.
    """
    columns = _Columns(table, said)
    if columns.paired:
        if said.label is not None:
            raise DataError(
                Problem("label", "none: pairs have both", "one that was said"), table.path
            )
        return [side for cells in columns.cells() for side in _sides(cells)]
    columns.need("prompt", "--map prompt=COLUMN")
    label = _labels(columns, said)
    return [_example(cells, label(cells)) for cells in columns.cells()]


def word(value: Any) -> str:
    """A value of a label column as it is compared: lower case, whole numbers without a point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().casefold()


def paths(value: Any, folder: Path) -> list[Path]:
    """The image files that a cell names: a path, a list of them, or several with semicolons."""
    if isinstance(value, str):
        # A name may hold a semicolon: it is one if there is such a file.
        names = [value] if (folder / value).is_file() else value.split(";")
    else:
        names = value
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise TypeError("paths")
    return [folder / name for name in names]


@dataclass(frozen=True, slots=True)
class _Cells:
    """What one row says, by field."""

    row: Row
    columns: Mapping[str, str]
    path: Path
    where: str

    def error(self, field: str, want: str, value: Any) -> DataError:
        name = self.columns.get(field, field)
        return DataError(Problem(f"{self.where}.{name}", want, repr(value)), self.path)

    def value(self, field: str) -> Any:
        return self.row.get(self.columns[field]) if field in self.columns else None

    def text(self, field: str) -> str:
        value = self.value(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, "a text that is not empty", value)
        return value

    def name(self, field: str) -> str | None:
        """A name, which may be a number."""
        value = self.value(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise self.error(field, "a text", value)
        return value

    def images(self) -> tuple[Path, ...]:
        value = self.value("images")
        try:
            found = paths([] if value is None else value, self.path.parent)
        except TypeError:
            raise self.error("images", "paths", value) from None
        for image in found:
            if not image.is_file():
                raise self.error("images", "an image file", str(image))
        return tuple(found)

    @property
    def source(self) -> str:
        return f"{self.path.name} {self.where}"


class _Columns:
    """Which column of a table holds which field: as said, or of the field's own name."""

    def __init__(self, table: Table, said: Said) -> None:
        self.table = table
        self.found: dict[str, str] = {}
        self.values: dict[str, frozenset[str]] = {}
        for field_, column in said.columns.items():
            self._say(field_, column)
        for field_ in FIELDS:
            if field_ not in self.found and (name := self._own(field_)):
                self.found[field_] = name

    def _say(self, field_: str, column: str) -> None:
        if field_ not in FIELDS:
            raise DataError(Problem(f"--map {field_}", f"one of {', '.join(FIELDS)}", field_))
        values = ""
        if column not in self.table.columns:
            column, _, values = column.rpartition(":")
        if column not in self.table.columns:
            want = f"one of the columns {', '.join(self.table.columns)}"
            raise DataError(Problem(f"--map {field_}", want, column or values), self.table.path)
        self.found[field_] = column
        if values:
            if field_ not in ("harmful", "harmless"):
                want = "a column (only harmful and harmless have values)"
                raise DataError(Problem(f"--map {field_}", want, f"{column}:{values}"))
            self.values[field_] = frozenset(map(word, values.split(",")))

    def _own(self, field_: str) -> str | None:
        """The column of this name, in any case of letters if there is one alone."""
        names = (field_, "image") if field_ == "images" else (field_,)
        columns = self.table.columns
        exact = [name for name in names if name in columns]
        alike = [c for c in columns if c.strip().casefold() in names]
        return exact[0] if exact else alike[0] if len(alike) == 1 else None

    @property
    def paired(self) -> bool:
        """Whether a row holds both sides of a pair, each in a column of its own."""
        return {"harmful", "harmless"} <= self.found.keys() and not self.values

    def need(self, field_: str, instead: str) -> None:
        if field_ not in self.found:
            want = f"a column {field_}, or {instead}"
            raise DataError(
                Problem("columns", want, ", ".join(self.table.columns)), self.table.path
            )

    def cells(self) -> list[_Cells]:
        table = self.table
        return [
            _Cells(row, self.found, table.path, where)
            for row, where in zip(table.rows, table.where, strict=True)
        ]


def _labels(columns: _Columns, said: Said) -> Callable[[_Cells], bool]:
    """What says whether a row is harmful."""
    if said.label is not None:
        label = said.label
        if "harmful" in columns.found:
            found = f"a column {columns.found['harmful']} as well"
            raise DataError(Problem("label", "one that is said or one in the file", found))
        return lambda _: label
    if columns.values:
        return _labels_by_value(columns)
    columns.need("harmful", "--label harmful, --label harmless or --map harmful=COLUMN:VALUE")
    return lambda cells: _yes(cells, "harmful")


def _yes(cells: _Cells, field_: str) -> bool:
    value = cells.value(field_)
    label = _YES.get(word(value))
    if label is None:
        want = "true or false (another word for harmful: --map harmful=COLUMN:VALUE)"
        raise cells.error(field_, want, value)
    return label


def _labels_by_value(columns: _Columns) -> Callable[[_Cells], bool]:
    """Labels by the values that were said; the others of a column have the other label only if
    they are all the same."""
    column, *others = dict.fromkeys(columns.found[side] for side in columns.values)
    if others:
        want = "values of one column for harmful and harmless"
        raise DataError(Problem("--map", want, f"{column} and {others[0]}"), columns.table.path)
    present = {word(row[column]) for row in columns.table.rows if column in row}
    harmful, harmless = (columns.values.get(s, frozenset()) for s in ("harmful", "harmless"))
    if both := harmful & harmless:
        raise DataError(Problem("--map", "each value on one side", ", ".join(sorted(both))))
    for side, values in columns.values.items():
        if missing := values - present:
            want = f"values of the column {column}: {_some(present)}"
            raise DataError(Problem(f"--map {side}", want, _some(missing)), columns.table.path)
    rest = present - harmful - harmless
    if rest and (len(rest) > 1 or len(columns.values) > 1):
        other = "harmless" if harmful else "harmful"
        want = f"every value of {column} on one side (--map {other}={column}:VALUE)"
        raise DataError(Problem("--map", want, f"also {_some(rest)}"), columns.table.path)

    def label(cells: _Cells) -> bool:
        value = cells.row.get(column)
        if value is None:
            raise DataError(Problem(f"{cells.where}.{column}", "a label", "none"), cells.path)
        return word(value) in harmful if harmful else word(value) not in harmless

    return label


def _some(values: frozenset[str] | set[str]) -> str:
    shown = sorted(values)
    return ", ".join(shown[:_SHOWN]) + (" ..." if len(shown) > _SHOWN else "")


def _example(cells: _Cells, harmful: bool) -> Example:
    kind = cells.name("kind") or "general"
    pair, group, system = (cells.name(key) for key in ("pair", "group", "system"))
    text, images = cells.text("prompt"), cells.images()
    return Example(text, harmful, kind, pair, images, group, system, cells.source)


def _sides(cells: _Cells) -> tuple[Example, Example]:
    texts, images = [cells.text(side) for side in ("harmful", "harmless")], cells.images()
    pair = cells.name("pair") or pair_id(*texts, images=images)
    kind, group = cells.name("kind") or "pair", cells.name("group")
    first, second = (
        Example(text, harmful, kind, pair, images, group, cells.name("system"), cells.source)
        for text, harmful in zip(texts, (True, False), strict=True)
    )
    return first, second


def pair_id(*texts: str, images: Sequence[Path] = ()) -> str:
    """A name for a pair that has none: of its contents, so that no two files share it by chance."""
    digest = hashlib.sha256("\0".join(texts).encode())
    for image in images:
        digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()[:16]
