"""Head matrices at low rank: the best approximation W ~ u v and what it loses (Eckart-Young)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from steerbridge.tensors import Float32

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LowRank:
    """W ~ u v with the relative Frobenius norm of what was cut off."""

    u: Float32  # [D, R]
    v: Float32  # [R, D]
    error: float


@dataclass(frozen=True, slots=True)
class Svd:
    """Singular values [R] of a matrix, largest first, with left [D, R] and right [R, D] vectors."""

    left: Float64
    values: Float64
    right: Float64

    @classmethod
    def of(cls, matrix_DD: Float32) -> Self:
        """Of a matrix."""
        return cls(*np.linalg.svd(matrix_DD.astype(np.float64)))

    @classmethod
    def of_product(cls, u_DR: Float32, v_RD: Float32) -> Self:
        """Of u v, without making it."""
        left, lower = np.linalg.qr(u_DR.astype(np.float64))
        right, upper = np.linalg.qr(v_RD.astype(np.float64).T)
        inner, values, outer = np.linalg.svd(lower @ upper.T)
        return cls(left @ inner, values, outer @ right.T)

    def rank_of(self, energy: float) -> int:
        """The smallest rank that keeps this share (0 to 1) of the squared singular values."""
        squares = self.values**2
        shares = np.cumsum(squares) / max(float(squares.sum()), 1e-300)
        return min(int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1, len(self.values))

    def cut(self, rank: int) -> LowRank:
        """The best approximation of this rank, singular values split evenly."""
        root = np.sqrt(self.values[:rank])
        squares = self.values**2
        lost = float(squares[rank:].sum() / max(float(squares.sum()), 1e-300))
        return LowRank(
            np.ascontiguousarray(self.left[:, :rank] * root, np.float32),
            np.ascontiguousarray(self.right[:rank] * root[:, None], np.float32),
            float(np.sqrt(lost)),
        )


def low_rank(matrix_DD: Float32, rank: int) -> LowRank:
    """The best approximation of a matrix of this rank.

    Raises:
        ValueError: rank outside 1..D.
    """
    d = len(matrix_DD)
    if not 1 <= rank <= d:
        raise ValueError(f"rank must be in 1..{d}, found {rank}")
    return Svd.of(matrix_DD).cut(rank)
