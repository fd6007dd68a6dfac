"""`steerbridge inspect`: a readable sheet of a package."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import command_line
from steerbridge.encodings import CONFIG_NAME
from steerbridge.errors import InvalidSpec, Problem, UnknownFormat
from steerbridge.format import Format, detect
from steerbridge.package import SteeringPackage, load
from steerbridge.sheet import describe
from steerbridge.spec import unknown_fields


def inspect(
    package: command_line.Package,
    strict: Annotated[
        bool, typer.Option(help="Refuse fields of a package that this version does not know.")
    ] = False,
    json: command_line.Json = False,
) -> None:
    """Show what a package reads, when it fires, what it changes, and its evidence.

    Artifacts of other tools (see `formats`) are shown as their files say it.
    """
    if (foreign := _foreign(Path(package))) is not None:
        shown = {"format": foreign.name, **foreign.contents(Path(package))}
        if json:
            command_line.print_json(shown)
        else:
            print(f"{package}: {foreign.title}\n{dumps(shown, indent=2)}")
        return
    loaded = load(package)
    unknown = list(unknown_fields(loaded.spec))
    if strict and unknown:
        want = "a field of the format"
        found = [(field, f"did you mean {near}?" if near else "none") for field, near in unknown]
        raise InvalidSpec([Problem(field, want, near) for field, near in found], loaded.path)
    if json:
        command_line.print_json({"spec": loaded.spec.to_json(), "tensors": _tensors(loaded)})
    else:
        print(describe(loaded))
        for field, near in unknown:
            print(f"unknown    {field}" + (f": did you mean {near}?" if near else ""))


def _foreign(path: Path) -> Format | None:
    """The format of an artifact of another tool; None for a package or a hub id.

    Raises:
        UnknownFormat: the path is neither.
    """
    if not path.exists():
        return None
    try:
        format = detect(path)
    except UnknownFormat:
        if path.suffix == ".gguf" or (path / CONFIG_NAME).is_file():
            return None  # loading it says what is wrong with it as a package
        raise
    return None if format.name in ("steerbridge", "steerbridge-gguf") else format


def _tensors(package: SteeringPackage) -> dict[str, Any]:
    return {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in package.tensors.items()}
