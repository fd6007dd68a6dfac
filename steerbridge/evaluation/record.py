"""The record of an evaluation: figures, answers and what they came from, as one JSON file.

`steerbridge report` reads it. Paths of images are relative to the record where they can be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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


def build(
    rows: Sequence[Row],
    *,
    package: SteeringPackage | None,
    runtime: str,
    model: str,
    quantisation: str,
    judge: str,
    max_new_tokens: int,
    comparison: Comparison | None = None,
    perplexity: Any = None,
) -> dict[str, Any]:
    """Everything about an evaluation that a reader may ask for."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "package": package
        and {
            "name": package.spec.name,
            "sha256": package.sha256,
            "thresholds": {
                p.id: p.threshold for p in package.calibrated(runtime, quantisation).spec.probes
            },
        },
        "runtime": runtime,
        "model": model,
        "quantisation": quantisation,
        "data_sha256": data.sha256([row.example for row in rows]),
        "max_new_tokens": max_new_tokens,
        "judge": judge,
        "versions": environment.versions(),
        "machine": environment.machine(),
        "summary": measure.summary(rows),
        "intervals": measure.intervals(rows),
        "perplexity": perplexity,
        "comparison": None if comparison is None else comparison.as_json(),
        "rows": [row.as_json() for row in rows],
    }


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record, atomically."""
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
        DataError: it is none, or of a newer version.
    """
    try:
        found: Any = json.loads(path.read_bytes())
        kind, version = found["format"], found["version"]
    except (ValueError, KeyError, TypeError) as error:
        want = "a record of `steerbridge eval --record`"
        raise DataError(Problem("file", want, repr(error)), path) from error
    if (kind, version) != (FORMAT, VERSION):
        raise DataError(Problem("format", f"{FORMAT} {VERSION}", f"{kind} {version}"), path)
    for row in found["rows"]:
        row["images"] = [str(path.parent / image) for image in row.get("images", [])]
    return dict(found)
