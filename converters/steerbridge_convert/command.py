"""The commands of the converters, and the function behind `steerbridge.convert`."""

from typing import Final

from steerbridge.registry import Command, Deferred

CONVERT: Final = Command(
    target="steerbridge_convert.cli:convert",
    summary="Convert an artifact from or to another tool's format.",
)
FORMATS: Final = Command(
    target="steerbridge_convert.cli:formats",
    summary="List the formats and the options that each needs.",
)
FUNCTION: Final = Deferred(target="steerbridge_convert.conversion:convert", extra="convert")
