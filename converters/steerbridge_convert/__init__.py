"""Converters: steering artifacts move between runtimes and tools, and nothing is lost silently.

`convert(source, target, to=...)` reads any format into a steering package and writes any other.
One module per tool; formats are found through the entry points `steerbridge.formats`, so a
third party can add one. What a format cannot represent is a list of `Loss`, refused unless allowed.
"""

from typing import TYPE_CHECKING

from steerbridge.registry import lazy

if TYPE_CHECKING:
    from steerbridge_convert.conversion import convert, read

__all__ = ["convert", "read"]

__getattr__ = lazy(__name__, dict.fromkeys(__all__, "steerbridge_convert.conversion"))
