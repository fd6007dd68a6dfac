"""`python picture_decoder.py PIXELS`: decodes pictures of strangers, with little memory and time.

It reads picture files, each behind its length, and writes width, height and RGB bytes of each. It
imports nothing but Pillow, and ends with an error at the first file that it does not take.
"""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import warnings
from typing import Final

FORMATS: Final = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
SECONDS: Final = 10
MEMORY: Final = 1 << 30  # bytes of address space
LENGTH: Final = struct.Struct("<Q")
SIZE: Final = struct.Struct("<II")


def main(pixels: int) -> None:
    """Decode what comes in, at most so many pixels in all."""
    _limit()
    from PIL import Image

    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # counted here
    source, target, left = sys.stdin.buffer, sys.stdout.buffer, pixels
    while head := source.read(LENGTH.size):
        content = source.read(*LENGTH.unpack(head))
        # Only these formats: for some others, Pillow starts programs.
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            left -= picture.width * picture.height
            if left < 0:
                raise ValueError(f"more than {pixels} pixels")
            decoded = picture.convert("RGB")
        target.write(SIZE.pack(*decoded.size))
        target.write(decoded.tobytes())


def _limit() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]))
