"""Tensors of a package: a stored dtype and a numpy array, memory-mapped where possible.

numpy has no bfloat16, so BF16 is carried as its uint16 bits and widened on use.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Dtype: TypeAlias = Literal["F32", "F16", "BF16"]
Float32: TypeAlias = NDArray[np.float32]

STORAGE: dict[Dtype, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_CHUNK = 1 << 22  # elements looked at together, so that a mapped 1 GB tensor stays on disk
_LARGE = 1 << 28  # bytes from which pages are let go: reading them again costs time


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """An array with the dtype it is stored in. BF16 arrays hold the uint16 bit patterns."""

    dtype: Dtype
    array: NDArray[Any]

    def __post_init__(self) -> None:
        if self.array.dtype != STORAGE[self.dtype]:
            raise TypeError(f"{self.dtype} needs {STORAGE[self.dtype]}, found {self.array.dtype}")

    @classmethod
    def of(cls, values: NDArray[Any], dtype: Dtype = "F32") -> Tensor:
        """Store float values as `dtype`, rounding to nearest even."""
        if dtype == "BF16":
            return cls(dtype, _to_bf16(np.asarray(values, np.float32)))
        return cls(dtype, np.ascontiguousarray(values, STORAGE[dtype]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def float32(self) -> Float32:
        """The values as float32 (a view when stored so)."""
        return _widen(self.dtype, self.array)

    def finite(self) -> bool:
        """True if no value is NaN or infinite; reads the data in bounded pieces."""
        return all(bool(np.isfinite(part).all()) for part in self._pieces())

    def _pieces(self) -> Iterator[Float32]:
        flat = self.array.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            yield _widen(self.dtype, flat[start : start + _CHUNK])
            _let_go(flat)

    def __eq__(self, other: object) -> bool:
        """Equal dtype, shape and bits (so NaN equals itself and 0.0 differs from -0.0)."""
        if not isinstance(other, Tensor):
            return NotImplemented
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        bits = np.dtype(f"<u{self.array.dtype.itemsize}")
        mine, theirs = self.array.reshape(-1).view(bits), other.array.reshape(-1).view(bits)
        for i in range(0, mine.size, _CHUNK):
            if not np.array_equal(mine[i : i + _CHUNK], theirs[i : i + _CHUNK]):
                return False
            _let_go(mine)
            _let_go(theirs)
        return True

    __hash__ = None  # type: ignore[assignment]


def _let_go(array: NDArray[Any]) -> None:
    """Let the pages of a large mapped file leave memory; they are read again when needed."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and array.nbytes > _LARGE and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _widen(dtype: Dtype, array: NDArray[Any]) -> Float32:
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _to_bf16(values: Float32) -> NDArray[np.uint16]:
    """Round to nearest even on the bit pattern; NaN keeps a quiet mantissa bit."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    # No overflow: the largest finite pattern plus 0x8000 still fits 32 bits.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype("<u2")
