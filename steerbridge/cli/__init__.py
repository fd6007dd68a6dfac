"""The command line: one file per command, `main` ties them together."""

from steerbridge.cli.app import main

__all__ = ["main"]
