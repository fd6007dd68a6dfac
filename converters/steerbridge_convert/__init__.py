"""Converters: steering artifacts move between runtimes and tools, and nothing is lost silently.

`convert(source, target, to=...)` reads any format into a steering package and writes any other.
One module per tool; formats are found through the entry points `steerbridge.formats`, so a
third party can add one. What a format cannot hold is a list of `Loss`, refused unless allowed.
"""

from steerbridge_convert.conversion import Report, convert, read

__all__ = ["Report", "convert", "read"]
