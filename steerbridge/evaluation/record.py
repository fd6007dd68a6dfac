"""The record of an evaluation: figures, answers and what they came from, as one JSON file.

`steerbridge report` reads it. Paths of images are relative to the record where they can be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from steerbridge import data, environment
from steerbridge.atomic import replacing
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import measure
from steerbridge.evaluation.compare import Comparison
from steerbridge.evaluation.measure import Row
from steerbridge.package import SteeringPackage

FORMAT: Final = "steerbridge-evaluation"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured of a guard: the rows, and what they came from.

    Args:
        rows: a row per prompt.
        package: None for a guard behind a server.
        runtime, model, quantisation: what answered.
        judge: name of the judge that `rows` are judged by.
        max_new_tokens: length of answers, at most.
        comparison: the guard beside other ways to refuse, if they were measured.
        perplexity: of a benign answer; see `measure.perplexity`.
        judges: name of another judge -> its rates.
        weights: hash of the model's weights (`LoadedModel.weights_sha256`); None: not known.
    """

    rows: Sequence[Row]
    package: SteeringPackage | None
    runtime: str
    model: str
    quantisation: str
    judge: str
    max_new_tokens: int
    comparison: Comparison | None = None
    perplexity: Any = None
    judges: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """The rates; see `measure.summary`."""
        return measure.summary(self.rows)

    @property
    def intervals(self) -> dict[str, Any]:
        """Their 95 % intervals; see `measure.intervals`."""
        return measure.intervals(self.rows)

    def to_json(self) -> dict[str, Any]:
        """The record that `steerbridge report` reads, as plain JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "package": None if self.package is None else self._package(self.package),
            "runtime": self.runtime,
            "model": self.model,
            "quantisation": self.quantisation,
            "data_sha256": data.sha256([row.example for row in self.rows]),
            "max_new_tokens": self.max_new_tokens,
            "judge": self.judge,
            "versions": environment.versions(),
            "machine": environment.machine(),
            "summary": self.summary,
            "intervals": self.intervals,
            "perplexity": self.perplexity,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "judges": dict(self.judges),
        }

    def _package(self, package: SteeringPackage) -> dict[str, Any]:
        weights = self.weights
        known = None if weights is None else lambda: weights
        probes = package.calibrated(self.runtime, self.quantisation, known).spec.probes
        return {
            "name": package.spec.name,
            "sha256": package.sha256,
            "thresholds": {p.id: p.threshold for p in probes},
        }

    def save(self, path: Path) -> None:
        """Write the record, atomically."""
        write(self.to_json(), path)


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record, atomically; paths of images become relative to it."""
    base = path.resolve().parent
    rows = [
        {**row, "images": [os.path.relpath(Path(i).resolve(), base) for i in row["images"]]}
        if "images" in row
        else row
        for row in record["rows"]
    ]
    with replacing(path) as fresh:
        fresh.write_text(json.dumps({**record, "rows": rows}, ensure_ascii=False), "utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        DataError: the file is no record, or one of a newer version.
    """
    try:
        record: Any = json.loads(path.read_bytes())
        kind, version = record["format"], record["version"]
    except (ValueError, KeyError, TypeError) as error:
        want = "a record of `steerbridge eval --record`"
        raise DataError(Problem("file", want, repr(error)), path) from error
    if (kind, version) != (FORMAT, VERSION):
        raise DataError(Problem("format", f"{FORMAT} {VERSION}", f"{kind} {version}"), path)
    for row in record["rows"]:
        row["images"] = [str(path.parent / image) for image in row.get("images", [])]
    return dict(record)
