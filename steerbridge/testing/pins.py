"""Pinned results: what a runtime must get right, and what it is known to refuse, lack or do wrong.

A pin file is JSON: for each runtime its shapes by status. `wrong` maps a shape to one line that
says what is wrong: a known fault, and a strict one: when it is mended, the pin must go.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from steerbridge.atomic import replacing
from steerbridge.testing.kit import Result, Status

STATUSES: Final[tuple[Status, ...]] = ("right", "refused", "absent", "wrong")


@dataclass(frozen=True, slots=True)
class Pins:
    """The pinned results of one runtime.

    Args:
        against: `real` or `simulator`.
        shapes: shape -> status and detail.
    """

    against: str
    shapes: Mapping[str, Result] = field(default_factory=dict)

    def differences(self, results: Mapping[str, Result]) -> list[str]:
        """One line for each result that is not as pinned."""
        lines = []
        for name, result in results.items():
            pinned = self.shapes.get(name)
            if pinned is None:
                lines.append(f"{name}: {result.status}, not pinned: {result.detail}")
            elif pinned.status != result.status:
                lines.append(
                    f"{name}: pinned {pinned.status}, found {result.status}: {result.detail}"
                )
        gone = sorted(set(self.shapes) - set(results))
        return lines + [f"{name}: pinned, but no shape any more" for name in gone]

    def counts(self) -> dict[str, int]:
        """Number of shapes by status."""
        return {s: sum(r.status == s for r in self.shapes.values()) for s in STATUSES}


def read(path: Path) -> dict[str, Pins]:
    """The pins of every runtime in a file."""
    if not path.is_file():
        return {}
    return {
        runtime: Pins(
            entry["against"],
            {
                name: Result(status, detail)
                for status in STATUSES
                for name, detail in entry[status].items()
            },
        )
        for runtime, entry in json.loads(path.read_text("utf-8")).items()
    }


def write(path: Path, pins: Mapping[str, Pins]) -> None:
    """Write the pins of every runtime, atomically."""
    content: dict[str, Any] = {}
    for runtime, one in sorted(pins.items()):
        entry: dict[str, Any] = {"against": one.against, **{status: {} for status in STATUSES}}
        for name, result in one.shapes.items():
            entry[result.status][name] = result.detail
        content[runtime] = entry
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


_MARKS = {"right": "right", "refused": "refused", "absent": "-", "wrong": "**WRONG**"}


def table(pins: Mapping[str, Pins]) -> Iterator[str]:
    """The pins as lines of Markdown: a table of all shapes, and the reasons behind it."""
    runtimes = sorted(pins, key=lambda name: (pins[name].against != "real", name))
    titles = [r if pins[r].against == "real" else f"{r} (simulator)" for r in runtimes]
    yield "| shape | " + " | ".join(titles) + " |"
    yield "|---|" + "---|" * len(runtimes)
    for shape in dict.fromkeys(name for r in runtimes for name in pins[r].shapes):
        cells = [_cell(pins[r], shape) for r in runtimes]
        yield f"| {shape} | " + " | ".join(cells) + " |"
    for title, status in (("Known faults", "wrong"), ("Refused", "refused")):
        yield from ["", f"## {title}", ""]
        for runtime in runtimes:
            for shape, result in pins[runtime].shapes.items():
                if result.status == status:
                    yield f"- {runtime}, {shape}: {result.detail}"


def _cell(pins: Pins, shape: str) -> str:
    result = pins.shapes.get(shape)
    if result is None:
        return ""
    mark = _MARKS[result.status]
    return f"{mark} (simulator)" if mark == "right" and pins.against == "simulator" else mark
