"""Pictures as tiles: the same pixels as `Idefics3ImageProcessorPil` and libmtmd make.

One limit: libmtmd resizes horizontally first, as Pillow did up to 12. Pillow 13, and with it
transformers, resizes vertically first where the height loses more than twice as many pixels as
the width (python-pillow/Pillow#9549), and some pixels then differ by a few levels. Of pictures no
taller than 1.5 times their width none is resized so, of reduced ones twice as tall nearly all.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TILE: Final = 64  # pixels a side
LONGEST_EDGE: Final = 2 * TILE  # at one tile, libmtmd and transformers split differently


def tiles(picture: Image.Image) -> NDArray[np.uint8]:
    """The tiles of a picture, row by row, then the overview: [n, 64, 64, 3].

    The same pixels as `Idefics3ImageProcessorPil` makes, without its overhead.
    """
    rgb = picture.convert("RGB")
    width, height = rgb.size
    if width >= height:
        size = (LONGEST_EDGE, _even(LONGEST_EDGE * height / width))
    else:
        size = (_even(LONGEST_EDGE * width / height), LONGEST_EDGE)
    grid = [-(-side // TILE) for side in size]
    for wanted in (size, (grid[0] * TILE, grid[1] * TILE)):
        if rgb.size != wanted:
            rgb = rgb.resize(wanted, Image.Resampling.LANCZOS)
    boxes = [
        (x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE)
        for y in range(grid[1])
        for x in range(grid[0])
    ]
    parts = [rgb.crop(box) for box in boxes]
    parts.append(rgb.resize((TILE, TILE), Image.Resampling.LANCZOS))
    return np.stack([np.asarray(part) for part in parts])


def _even(length: float) -> int:
    whole = max(1, int(length))
    return whole + whole % 2
