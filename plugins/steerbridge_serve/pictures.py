"""Pictures of clients, decoded once, by us, in a process of their own (`picture_decoder.py`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from steerbridge.errors import DataError, Problem
from steerbridge.serving import Picture
from steerbridge_serve import picture_decoder
from steerbridge_serve.picture_decoder import FORMATS, LENGTH, SECONDS, SIZE


def decode(files: Sequence[bytes], pixels: int) -> list[Picture]:
    """Decode picture files, the first frame of each.

    Args:
        pixels: of all of them, at most.

    Raises:
        DataError: a file that is none of `FORMATS` or is damaged, too many pixels.
    """
    # Isolated: neither the environment nor the working directory says what is imported.
    command = [sys.executable, "-I", picture_decoder.__file__, str(pixels)]
    sent = b"".join(part for file in files for part in (LENGTH.pack(len(file)), file))
    try:
        done = subprocess.run(
            command, input=sent, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"more than {SECONDS} seconds of work", pixels) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise _refused(lines[-1] if lines else f"its end ({done.returncode})", pixels)
    pictures, at = [], 0
    for _ in files:
        width, height = SIZE.unpack_from(done.stdout, at)
        begin, at = at + SIZE.size, at + SIZE.size + width * height * 3
        pictures.append(Picture(width, height, done.stdout[begin:at]))
    return pictures


def _refused(found: str, pixels: int) -> DataError:
    want = f"pictures ({', '.join(FORMATS)}) of {pixels} pixels at most in all"
    return DataError(Problem("messages", want, found))
