"""`steerbridge`: finds the command that is called, imports only that one, and ends its errors.

Exit codes: 0 done; 1 an error of the tree in `steerbridge.errors` or a missing file; 2 wrong
usage, or an extra that is not installed. With `--json` the last line of standard output is one
JSON object; progress and errors go to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from steerbridge import registry
from steerbridge.errors import RuntimeMissing, SteerbridgeError
from steerbridge.registry import Command


def build(arguments: Sequence[str]) -> typer.Typer:
    """The program for one command line: the called command, and the summaries of the others.

    Raises:
        RuntimeMissing: the called command imports what is not installed.
    """
    app = typer.Typer(
        name="steerbridge",
        help="Train a safety guard once; run the same steering package in every runtime.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(help=app.info.help)(_options)
    called = next((word for word in arguments if not word.startswith("-")), "")
    for name, command in registry.commands().items():
        if name == called:
            app.command(name)(command.load())
        else:
            app.command(name, help=f"{command.summary}{_extras(command)}")(_not_called)
    return app


def main() -> None:
    """Entry point of the `steerbridge` program."""
    try:
        build(sys.argv[1:])()
    except RuntimeMissing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (SteerbridgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version(registry.DISTRIBUTION))
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """What comes before the name of a command."""


def _extras(command: Command) -> str:
    """The extras that a command needs, for its line in the help."""
    needs = [command.extra] if command.extra else []
    if command.opens_model:
        needs.append(" or ".join(r.extra for r in registry.runtimes().values() if r.extra))
    return f" (extra: {', and '.join(needs)})" if needs else ""


def _not_called() -> None:
    """Stands for a command in the help of the program."""
