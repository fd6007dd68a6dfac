"""`steerbridge tensors`: a command is a function with Typer's annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import steerbridge


def tensors(
    package: Annotated[Path, typer.Argument(help="A steering package.")],
    values: Annotated[bool, typer.Option(help="Show the largest value of each.")] = False,
) -> None:
    """List the tensors of a package: name, type and shape."""
    # Errors of Steerbridge become one line on stderr and exit status 1 by themselves.
    for name, tensor in steerbridge.load(package).tensors.items():
        shape = " x ".join(map(str, tensor.shape))
        largest = f"  {abs(tensor.float32()).max():.4g}" if values else ""
        print(f"{name:24} {tensor.dtype:4} {shape}{largest}")
