"""The trained tensors on disk: safetensors, F16, in this package under `data/weights.safetensors`.

Names are those of the model in transformers, and `image_tokens` for the eight added rows of
the token embedding. This module needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from steerbridge.atomic import replacing
from steerbridge.errors import BrokenPackage, DataError, Problem

EMBEDDINGS: Final = "image_tokens"

Array = NDArray[np.float32]


def read_shipped(path: Path | None = None) -> dict[str, Array]:
    """The tensors of `path`, or of the weights in this package, as F32.

    Raises:
        BrokenPackage: not safetensors.
        DataError: a tensor that is not F16 or not finite.
        FileNotFoundError: there is no such file.
    """
    if path is not None:
        return read(path)
    with as_file(files(__package__ or "").joinpath("data", "weights.safetensors")) as shipped:
        return read(shipped)


def shipped_bytes() -> bytes:
    """The weights file in this package as it is.

    Raises:
        FileNotFoundError: there is none.
    """
    return files(__package__ or "").joinpath("data", "weights.safetensors").read_bytes()


def read(path: Path) -> dict[str, Array]:
    """The tensors of a weights file as F32 (see `read_shipped`)."""
    try:
        with safe_open(path, "np") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BrokenPackage(Problem("weights", "a safetensors file", str(error)), path) from error
    for name, tensor in stored.items():
        if tensor.dtype != np.float16:
            raise DataError(Problem(name, "F16", str(tensor.dtype)), path)
        if not np.isfinite(tensor).all():
            raise DataError(Problem(name, "finite values", "NaN or infinity"), path)
    return {name: tensor.astype(np.float32) for name, tensor in stored.items()}


def write(path: Path, tensors: dict[str, Array]) -> None:
    """Round to F16 and write: beside the path, read back, rename.

    Raises:
        DataError: a value that is not finite in F16.
    """
    with np.errstate(over="ignore"):
        halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    for name, tensor in halves.items():
        if not np.isfinite(tensor).all():
            raise DataError(Problem(name, "values within F16", "NaN or infinity"), path)
    with replacing(path) as fresh:
        save_file(halves, fresh)
        back = read(fresh)
        if any((back[name] != tensor).any() for name, tensor in halves.items()):
            raise DataError(Problem("weights", "what was written", "other values"), path)
