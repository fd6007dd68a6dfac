"""The commands `run` and `doctor` (entry point `steerbridge.commands`)."""

from typing import Final

from steerbridge.registry import Command

RUN: Final = Command(
    target="steerbridge_run.cli:run",
    summary="Run an unmodified program with a package inside it.",
    extra="run",
)
DOCTOR: Final = Command(
    target="steerbridge_run.cli:doctor",
    summary="Say whether `run` would work with a program, and why not.",
    extra="run",
)
