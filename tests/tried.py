"""What the tests have tried with real programs: a file of records, and the table in docs/run.md.

    python tests/tried.py    # write the table from the records

Records are written by `make test-apps UPDATE=1`; otherwise each must be there already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

TESTS: Final = Path(__file__).resolve().parent
RECORDS: Final = TESTS / "apps" / "tried.json"
PAGE: Final = TESTS.parent / "docs" / "run.md"
BEGIN: Final = "<!-- made by tests/tried.py -->\n"
END: Final = "<!-- end -->\n"

Result = Literal["steered", "refused", "not steered"]
Records = dict[str, dict[str, str]]  # by program and its version: results by shape
DOCTOR: Final = "doctor"  # beside the shapes: what `steerbridge doctor` says


def updating() -> bool:
    return bool(os.environ.get("STEERBRIDGE_TRIED_UPDATE"))


def known() -> Records:
    records: Records = json.loads(RECORDS.read_text("utf-8")) if RECORDS.exists() else {}
    return records


class Tried:
    """Takes the records of one run of the tests."""

    def __init__(self) -> None:
        self._known = known()
        self._new: Records = {}

    def __call__(self, program: str, shape: str, result: Result | str = "steered") -> None:
        """A shape of use has passed its test.

        Raises:
            AssertionError: the records say something else.
        """
        self._new.setdefault(program, {})[shape] = result
        if not updating():
            found = self._known.get(program, {}).get(shape)
            assert found == result, f"{program}, {shape}: {found}; make test-apps UPDATE=1"

    def doctor(self, program: str, said: str) -> None:
        """What `doctor` says of a program."""
        self(program, DOCTOR, said)

    def keep(self) -> None:
        """Write what was tried, in place of all older records."""
        RECORDS.write_text(json.dumps(self._new, indent=1, sort_keys=True) + "\n", "utf-8")
        write_table()


def table(records: Records) -> Iterator[str]:
    shapes = sum(shape != DOCTOR for results in records.values() for shape in results)
    yield f"{len(records)} programs, {shapes} shapes of use; what `doctor` says of each."
    yield ""
    yield "| program | `doctor` | result | shapes of use |"
    yield "|---|---|---|---|"
    for program, results in sorted(records.items()):
        said = results.get(DOCTOR, "")
        tried = {shape: found for shape, found in results.items() if shape != DOCTOR}
        for result in sorted(set(tried.values()), reverse=True):
            shapes_of = sorted(shape for shape, found in tried.items() if found == result)
            yield f"| {program} | {said} | {result} | {', '.join(shapes_of)} |"
            program = said = ""


def page(text: str, lines: Iterable[str]) -> str:
    """A page with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after


def write_table() -> None:
    PAGE.write_text(page(PAGE.read_text("utf-8"), table(known())), "utf-8")


if __name__ == "__main__":
    write_table()
