"""Smaller packages: low-rank head matrices, tensors with fewer bits."""

from __future__ import annotations

from typing import Final

import numpy as np

from steerbridge.conversion import Truncation
from steerbridge.errors import ConversionError
from steerbridge.format import Loss
from steerbridge.low_rank import Svd
from steerbridge.package import SteeringPackage
from steerbridge.spec import DenseMatrix, HeadMatrix, LowRankMatrix
from steerbridge.tensors import Dtype, Tensor

# Rounding alone costs at most 2^-11 in F16 and 2^-8 in BF16, relative to each value; values below
# the smallest that the type has cost all.
_ROUNDING: Final = 2.0**-8


def reduced(
    package: SteeringPackage, rank: int | None, energy: float | None, dtype: Dtype | None
) -> tuple[SteeringPackage, tuple[Truncation, ...], list[Loss]]:
    """The package with its head matrices reduced and its tensors stored as `dtype`; what was cut,
    and what is lost beyond rounding.

    Raises:
        ConversionError: rank or energy out of range, or both given.
    """
    truncations: list[Truncation] = []
    losses: list[Loss] = []
    if rank is not None or energy is not None:
        if rank is not None and energy is not None:
            raise ConversionError("give rank or energy, not both")
        for head in package.spec.interventions:
            if isinstance(head, HeadMatrix):
                package, cut = _truncated(package, head, rank, energy)
                truncations.append(cut)
        if not truncations:
            raise ConversionError("rank and energy are of head matrices; the package has none")
    if dtype is not None:
        package = package.replace(
            tensors={n: _stored(n, t, dtype, losses) for n, t in package.tensors.items()}
        )
    return package, tuple(truncations), losses


def _stored(name: str, tensor: Tensor, dtype: Dtype, losses: list[Loss]) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    before = tensor.float32()
    with np.errstate(over="ignore"):  # told below
        stored = Tensor.of(before, dtype)
    if not stored.finite():
        raise ConversionError(f"tensor {name}: a value is too large for {dtype}")
    norm = float(np.linalg.norm(before.astype(np.float64)))
    error = float(np.linalg.norm(before.astype(np.float64) - stored.float32()))
    if error > _ROUNDING * norm:
        effect = f"values too small for it: a relative error of {error / norm:.3g}"
        losses.append(Loss(f"tensor {name} in {dtype}", effect))
    return stored


def _truncated(
    package: SteeringPackage, head: HeadMatrix, rank: int | None, energy: float | None
) -> tuple[SteeringPackage, Truncation]:
    """Replace one matrix with its best approximation of lower rank."""
    if isinstance(head.weight, DenseMatrix):
        names: tuple[str, ...] = (head.weight.matrix,)
        svd = Svd.of(package.tensors[head.weight.matrix].float32())
    else:
        names = (head.weight.u, head.weight.v)
        svd = Svd.of_product(*(package.tensors[name].float32() for name in names))
    if rank is None:
        assert energy is not None
        if not 0 < energy <= 1:
            raise ConversionError(f"energy must be in 0..1, found {energy}")
        rank = svd.rank_of(energy)
    if not 1 <= rank <= len(svd.left):
        raise ConversionError(f"rank must be in 1..{len(svd.left)}, found {rank}")
    rank = min(rank, len(svd.values))
    cut = svd.cut(rank)
    u, v = f"{head.id}.u", f"{head.id}.v"
    tensors = {name: t for name, t in package.tensors.items() if name not in names}
    tensors |= {u: Tensor.of(cut.u), v: Tensor.of(cut.v)}
    low = head.replace(weight=LowRankMatrix(form="low_rank", u=u, v=v))
    interventions = tuple(low if x.id == head.id else x for x in package.spec.interventions)
    reduced_package = package.replace(tensors=tensors, interventions=interventions)
    return reduced_package, Truncation(head.id, rank, cut.error)
