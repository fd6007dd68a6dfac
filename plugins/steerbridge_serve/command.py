"""The command `serve` (entry point `steerbridge.commands`)."""

from typing import Final

from steerbridge.registry import Command

SERVE: Final = Command(
    target="steerbridge_serve.cli:serve",
    summary="Serve a steered model to clients of OpenAI and TGI, with a page to try it.",
    extra="serve",
)
