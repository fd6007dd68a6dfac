"""Smaller packages: head matrices at low rank, tensors in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from steerbridge.errors import ConversionError
from steerbridge.package import SteeringPackage
from steerbridge.spec import DenseMatrix, HeadMatrix, LowRankMatrix
from steerbridge.tensors import Dtype, Float32, Tensor


@dataclass(frozen=True, slots=True)
class Truncation:
    """A head matrix at low rank; `error` is the relative Frobenius norm of what was cut."""

    intervention: str
    rank: int
    error: float

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {"intervention": self.intervention, "rank": self.rank, "error": self.error}


def reduced(
    package: SteeringPackage, rank: int | None, energy: float | None, dtype: Dtype | None
) -> tuple[SteeringPackage, tuple[Truncation, ...]]:
    """The package with its head matrices cut and its tensors stored as `dtype`.

    Raises:
        ConversionError: rank or energy outside what is possible, or both given.
    """
    truncations: list[Truncation] = []
    if rank is not None or energy is not None:
        if rank is not None and energy is not None:
            raise ConversionError("give a rank or an energy, not both")
        for head in package.spec.interventions:
            if isinstance(head, HeadMatrix):
                package, cut = _truncated(package, head, rank, energy)
                truncations.append(cut)
    if dtype is not None:
        package = replace(
            package, tensors={n: _stored(t, dtype) for n, t in package.tensors.items()}
        )
    return package, tuple(truncations)


def _stored(tensor: Tensor, dtype: Dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    stored = Tensor.of(tensor.float32(), dtype)
    if not stored.finite():
        raise ConversionError(f"a value is too large for {dtype}")
    return stored


def _truncated(
    package: SteeringPackage, head: HeadMatrix, rank: int | None, energy: float | None
) -> tuple[SteeringPackage, Truncation]:
    """Replace one matrix by its best approximation (Eckart-Young), singular values split evenly."""
    left_DR, values_R, right_RD = _svd(package, head)
    total = float((values_R**2).sum())
    if rank is None:
        assert energy is not None
        if not 0 < energy <= 1:
            raise ConversionError(f"energy must be in 0..1, found {energy}")
        shares = np.cumsum(values_R**2) / max(total, 1e-300)
        rank = min(int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1, len(values_R))
    if not 1 <= rank <= len(left_DR):
        raise ConversionError(f"rank must be in 1..{len(left_DR)}, found {rank}")
    rank = min(rank, len(values_R))
    root = np.sqrt(values_R[:rank])
    u, v = f"{head.id}.u", f"{head.id}.v"
    names = (
        (head.weight.matrix,)
        if isinstance(head.weight, DenseMatrix)
        else (head.weight.u, head.weight.v)
    )
    tensors = {name: t for name, t in package.tensors.items() if name not in names}
    tensors[u] = Tensor.of((left_DR[:, :rank] * root).astype(np.float32))
    tensors[v] = Tensor.of((right_RD[:rank] * root[:, None]).astype(np.float32))
    low = head.model_copy(update={"weight": LowRankMatrix(form="low_rank", u=u, v=v)})
    others = tuple(low if x.id == head.id else x for x in package.spec.interventions)
    spec = package.spec.model_copy(update={"interventions": others})
    cut = float((values_R[rank:] ** 2).sum())
    error = float(np.sqrt(cut / max(total, 1e-300)))
    return SteeringPackage(spec, tensors), Truncation(head.id, rank, error)


def _svd(package: SteeringPackage, head: HeadMatrix) -> tuple[Float32, Float32, Float32]:
    """Left vectors [D, R], values [R] and right vectors [R, D] in float64."""
    if isinstance(head.weight, DenseMatrix):
        dense = package.tensors[head.weight.matrix].float32().astype(np.float64)
        return np.linalg.svd(dense)
    u = package.tensors[head.weight.u].float32().astype(np.float64)
    v = package.tensors[head.weight.v].float32().astype(np.float64)
    left, lower = np.linalg.qr(u)
    right, upper = np.linalg.qr(v.T)
    inner, values, outer = np.linalg.svd(lower @ upper.T)
    return left @ inner, values, outer @ right.T
