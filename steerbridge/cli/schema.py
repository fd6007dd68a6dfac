"""`steerbridge schema`: the JSON Schema of `steering_config.json`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from steerbridge.schema import build, page


def schema(
    markdown: Annotated[bool, typer.Option(help="Print a page in Markdown instead.")] = False,
) -> None:
    """Print the JSON Schema of steering_config.json, generated from the models."""
    print("\n".join(page(build())) if markdown else json.dumps(build(), indent=2))
