"""Options of the command line that name prompts, and what is read for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from steerbridge import data
from steerbridge.command_line import say
from steerbridge.data import Example
from steerbridge.datasets import checks, reading
from steerbridge.datasets.columns import FIELDS, Said
from steerbridge.errors import DataError, Problem

Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        help="Prompts: JSON, JSON Lines, CSV, Parquet, a published set, a dataset saved by "
        "`datasets`, or a directory of images; may be repeated.",
    ),
]
Label = Annotated[
    list[str],
    typer.Option(
        "--label",
        help="`harmful` or `harmless`: the label of every prompt of files that hold none; "
        "FILE=LABEL: of that file alone.",
    ),
]
Map = Annotated[
    list[str],
    typer.Option(
        "--map",
        help="FIELD=COLUMN, such as prompt=goal, or harmful=COLUMN:VALUE,VALUE; FILE=FIELD=COLUMN: "
        f"in that file alone. Fields: {', '.join(FIELDS)}.",
    ),
]
Encoding = Annotated[
    str, typer.Option(help="Encoding of files that are neither UTF-8 nor marked, such as cp1252.")
]
Corpus = Annotated[
    str, typer.Option(help="Splits of the shipped prompts to add, joined by +, or `none`.")
]

TRAFFIC = "traffic"
_MAP = re.compile(rf"(?:(?P<file>.+)=)?(?P<field>{'|'.join(FIELDS)})=(?P<column>.+)")


@dataclass(frozen=True, slots=True)
class Prompts:
    """The options of one command line. `traffic` are files of harmless prompts, of kind `traffic`
    whatever they say."""

    paths: Sequence[Path]
    labels: Sequence[str] = ()
    maps: Sequence[str] = ()
    encoding: str = ""
    corpus: str = "none"
    traffic: Sequence[Path] = ()

    def read(self, wanted: str) -> list[Example]:
        """The prompts of the files and of the corpus; tells how the files were read.

        Args:
            wanted: what they are for.

        Raises:
            DataError: there are none, they cannot be read, or one has both labels.
        """
        examples = self.examples(self.readings(), wanted)
        checks.check(examples)
        return examples

    def examples(self, readings: Sequence[reading.PromptFile], wanted: str) -> list[Example]:
        """The prompts of files that were read, and of the shipped corpus' splits."""
        examples = [e for one in readings for e in one.examples]
        if self.corpus != "none":
            examples += [e for s in self.corpus.split("+") for e in data.corpus_examples(s)]
        if not examples:
            raise DataError(Problem("--data or --corpus", f"prompts {wanted}", "none"))
        return examples

    def readings(self) -> list[reading.PromptFile]:
        """What each file gave."""
        said = [self._said(path) for path in self.paths]
        self._all_used()
        readings = [reading.read(path, one) for path, one in zip(self.paths, said, strict=True)]
        for path in self.traffic:
            one = reading.read(path, Said(False, {}, self.encoding or None))
            as_traffic = tuple(replace(e, kind=TRAFFIC) for e in one.examples)
            readings.append(replace(one, examples=as_traffic))
        for one in readings:
            say(str(one))
        return readings

    def _said(self, path: Path) -> Said:
        label: bool | None = None
        for value in self.labels:
            file, word = _label(value)
            if not file or _names(file, path):
                label = word == "harmful"
        columns = {}
        for value in self.maps:
            file, field, column = _map(value)
            if not file or _names(file, path):
                columns[field] = column
        return Said(label, columns, self.encoding or None)

    def _all_used(self) -> None:
        """An option for a file that is not read would silently do nothing."""
        for option, files in (
            ("--label", [_label(value)[0] for value in self.labels]),
            ("--map", [_map(value)[0] for value in self.maps]),
        ):
            for file in filter(None, files):
                if not any(_names(file, path) for path in self.paths):
                    shown = ", ".join(map(str, self.paths)) or "none"
                    raise DataError(Problem(f"{option} {file}", "a file of --data", shown))
        if (self.labels or self.maps) and not self.paths:
            raise DataError(Problem("--data", "the files that --label or --map is about", "none"))


def _names(file: str, path: Path) -> bool:
    return file in (str(path), path.name)


def _label(value: str) -> tuple[str, str]:
    """(file or empty, label)."""
    file, _, word = value.rpartition("=")
    if word not in ("harmful", "harmless"):
        raise DataError(
            Problem("--label", "harmful or harmless (FILE=harmful: of one file)", value)
        )
    return file, word


def _map(value: str) -> tuple[str, str, str]:
    """(file or empty, field, column)."""
    match = _MAP.fullmatch(value)
    if match is None:
        want = f"FIELD=COLUMN with a field of {', '.join(FIELDS)}"
        raise DataError(Problem("--map", want, value))
    return match["file"] or "", match["field"], match["column"]
