"""`steerbridge.read_examples`: files of prompts as examples, with how each file was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerbridge.data import Example
from steerbridge.datasets import columns, files, published
from steerbridge.datasets.columns import Said
from steerbridge.errors import DataError, Problem

QUESTIONS = ("What is in the picture?", "Describe this image.", "What does this show?")


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What one file gave, and how it was understood."""

    path: Path
    examples: tuple[Example, ...]
    read_as: str
    left_out: str = ""  # how many rows gave no example, and why; empty: none

    def to_json(self) -> dict[str, Any]:
        known = {"path": str(self.path), "prompts": len(self.examples), "read_as": self.read_as}
        return {**known, "left_out": self.left_out}

    def __str__(self) -> str:
        left = f"; left out: {self.left_out}" if self.left_out else ""
        return f"{self.path}: {len(self.examples)} prompts, read as {self.read_as}{left}"


def read_examples(
    path: str | Path,
    *,
    label: bool | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> list[Example]:
    """Read labelled prompts from a file or directory of any kind that is known.

    JSON Lines, JSON arrays, CSV and the like (gzip, bzip2, xz), Parquet, what `datasets` saved to
    disk, a directory of images in `harmful` and `harmless`. Columns of our own are `prompt`,
    `harmful`, `kind`, `pair`, `group`, `system` and `images`, or `harmful` and `harmless` for the
    two sides of an aligned pair; published sets are recognised by their columns. A row without a
    label is an error.

    Args:
        label: of every row, where the file holds none: True is harmful.
        columns: field -> the column it is in; `harmful` and `harmless` may be COLUMN:VALUE,VALUE.
        encoding: of a text that is neither UTF-8 nor has a byte order mark.

    Raises:
        DataError: names the row and column that cannot be used, or what has to be said.
        RuntimeMissing: Parquet or a saved dataset without pyarrow (extra `eval`).
        FileNotFoundError: there is no such file.
    """
    return list(read(Path(path), Said(label, columns or {}, encoding)).examples)


def read(path: Path, said: Said | None = None) -> PromptFile:
    """The same, with how the file was understood."""
    said = said or Said()
    if path.is_dir() and not _saved(path):
        return _pictures(path, said)
    table = files.read(path, said.encoding)
    if not table.rows:
        raise DataError(Problem("file", "at least one example", "none"), path)
    known = None if said.columns else published.recognised(table)
    if known is None:
        return PromptFile(path, tuple(columns.examples(table, said)), _named(table, said))
    found, left = published.examples(table, known, said.label)
    if not found:
        raise DataError(Problem(known.name, "at least one labelled prompt", "none"), path)
    without = f"{left} rows ({known.left_out})" if left else ""
    return PromptFile(path, tuple(found), f"{known.name}: {_how(known, said)}", without)


def _saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _how(known: published.Published, said: Said) -> str:
    return f"{_word(said.label)}, as said" if known.asks else known.label


def _named(table: files.Table, said: Said) -> str:
    if said.label is not None:
        return f"prompts, {_word(said.label)} as said"
    if said.columns:
        return ", ".join(f"{field}={column}" for field, column in said.columns.items())
    lowered = {name.casefold() for name in table.columns}
    return "aligned pairs" if "harmless" in lowered else "prompts with their labels"


def _word(label: bool | None) -> str:
    return "harmful" if label else "harmless"


def _pictures(folder: Path, said: Said) -> PromptFile:
    """Images in the folders `harmful` and `harmless`, in those of ToViLaG, or with a label that
    was said; each with a question in turn, of kind `image`."""
    found: list[tuple[Path, bool]] = []
    labelled = [folder / name for name in ("harmful", "harmless") if (folder / name).is_dir()]
    if labelled and said.label is not None:
        want = "one that is said or one in the folders"
        raise DataError(Problem("label", want, f"a folder {labelled[0].name} as well"), folder)
    if said.label is not None:
        read_as = f"images, {_word(said.label)} as said"
        found = [(image, said.label) for image in files.images(folder)]
    elif labelled:
        read_as = "images in harmful and harmless"
        for one in labelled:
            found += [(image, one.name == "harmful") for image in files.images(one)]
    else:
        read_as = f"ToViLaG: {published.TOVILAG}"
        for name in published.TOVILAG_FOLDERS:
            found += [(image, True) for image in files.images(folder / name)]
    if not found:
        want = "images in the folders harmful and harmless, or --label harmful or harmless"
        raise DataError(Problem("directory", want, "none"), folder)
    if others := set(files.images(folder)) - {image for image, _ in found}:
        where = str(min(others).relative_to(folder))
        raise DataError(
            Problem("directory", "a label for every image", f"none for {where}"), folder
        )
    examples = [
        Example(
            QUESTIONS[i % len(QUESTIONS)],
            harmful,
            "image",
            None,
            (path,),
            source=str(path.relative_to(folder)),
        )
        for i, (path, harmful) in enumerate(found)
    ]
    return PromptFile(folder, tuple(examples), read_as)
