"""`steerbridge report`: an evaluation as one HTML file, or as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerbridge import command_line
from steerbridge.evaluation import record, report
from steerbridge.package import load


def write(
    records: Annotated[list[Path], typer.Argument(help="Files of `steerbridge eval --record`.")],
    out: Annotated[Path, typer.Option(help="File to write: .html or .md.")] = Path("report.html"),
    package: Annotated[
        str,
        typer.Option("--package", "-p", help="The package that was measured; its card is added."),
    ] = "",
    json: command_line.Json = False,
) -> None:
    """Write a report of one or more evaluations of a package."""
    evaluations = [record.read(path) for path in records]
    written = report.write(evaluations, load(package) if package else None, out)
    if json:
        command_line.print_json({"report": str(written), "records": len(evaluations)})
    else:
        print(f"wrote {written}")
