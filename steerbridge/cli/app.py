"""`steerbridge`: the commands and how their errors end.

Exit codes: 0 done; 1 an error of the tree in `steerbridge.errors` or a missing file; 2 wrong
usage. With `--json` the last line of standard output is one JSON object; progress and errors
go to standard error.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer

from steerbridge.cli import calibrate, evaluate, generate, inspect, report, schema, train
from steerbridge.errors import SteerbridgeError

app = typer.Typer(
    name="steerbridge",
    help="Train a safety guard once; run the same steering package in every runtime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("inspect")(inspect.inspect)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("report")(report.write)
app.command("schema")(schema.schema)
for _entry in entry_points(group="steerbridge.commands"):  # of what stands on the core
    app.command(_entry.name)(_entry.load())


def main() -> None:
    """Entry point of the `steerbridge` command."""
    try:
        app()
    except (SteerbridgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
