"""Probes as other tools store them: without normalisation, with fixed threshold and class order.

Folding these in changes scores but no decision: the new score passes the new threshold exactly
when the old score passed the old threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge.errors import NotRepresentable
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    DenseLayer,
    LinearProbe,
    MlpProbe,
    Probe,
    Reading,
    Softmax,
)
from steerbridge.tensors import Float32, Tensor

Float64 = NDArray[np.float64]
KEYS: Final = ("layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias")


@dataclass(frozen=True, slots=True)
class Mlp:
    """A probe of dense layers: weights [out, in], biases, relu between layers, softmax of two."""

    weights: tuple[Float32, ...]
    biases: tuple[Float32, ...]


def two_class(
    id: str, mlp: Mlp, harmful: int, reading: Reading, comparator: str, threshold: float
) -> tuple[MlpProbe, dict[str, Tensor]]:
    """A probe with a softmax over two classes; `harmful` is the index of the harmful class."""
    names = [f"{id}.{i}" for i in range(len(mlp.weights))]
    tensors = {f"{n}.weight": Tensor.of(w) for n, w in zip(names, mlp.weights, strict=True)}
    tensors |= {f"{n}.bias": Tensor.of(b) for n, b in zip(names, mlp.biases, strict=True)}
    classes = ("harmful", "harmless") if harmful == 0 else ("harmless", "harmful")
    probe = MlpProbe(
        id=id,
        type="mlp",
        readings=(reading,),
        layers=tuple(DenseLayer(weight=f"{n}.weight", bias=f"{n}.bias") for n in names),
        activation="relu",
        output=Softmax(type="softmax", classes=classes, harmful="harmful"),
        comparator=comparator,  # type: ignore[arg-type] # pydantic checks the sign
        threshold=threshold,
    )
    return probe, tensors


def as_two_class(
    package: SteeringPackage, probe: MlpProbe, harmful: int, threshold: float, format: str
) -> Mlp:
    """The layers of a two-class probe with the harmful class at `harmful`, firing at `threshold`.

    The normalisation of the input is folded into the first layer, the threshold into the last bias:
    P > t is z_h - z_o > log(t / (1 - t)).

    Raises:
        NotRepresentable: another activation or output, or a threshold outside 0..1.
    """
    output = probe.output
    if probe.activation != "relu" or not isinstance(output, Softmax) or len(output.classes) != 2:
        raise NotRepresentable(
            format, f"probe {probe.id}: it supports only relu and a softmax of two classes"
        )
    weights = [package.tensors[layer.weight].float32().copy() for layer in probe.layers]
    biases = [package.tensors[layer.bias].float32().copy() for layer in probe.layers]
    weights[0], biases[0] = _unnormalised(package, probe, weights[0], biases[0])
    if output.classes.index(output.harmful) != harmful:
        weights[-1], biases[-1] = weights[-1][::-1].copy(), biases[-1][::-1].copy()
    if probe.threshold != threshold:
        moved = _logit(threshold, format) - _logit(probe.threshold, format)
        biases[-1][harmful] += np.float32(moved)
    return Mlp(tuple(weights), tuple(biases))


def as_linear(package: SteeringPackage, probe: LinearProbe, format: str) -> tuple[Float32, float]:
    """w and b such that w . x + b >= 0 when the probe fires (except exactly at the threshold).

    Raises:
        NotRepresentable: no finite bias corresponds to the threshold of a sigmoid.
    """
    weight = package.tensors[probe.weight].float32()[None]
    weight, bias = _unnormalised(package, probe, weight, np.array([probe.bias], np.float64))
    threshold = _logit(probe.threshold, format) if probe.link == "sigmoid" else probe.threshold
    w, b = weight[0], float(bias[0]) - threshold
    return (-w, -b) if probe.comparator in ("<", "<=") else (w, b)


def _unnormalised(
    package: SteeringPackage, probe: Probe, weight: Float32, bias: Any
) -> tuple[Float32, Any]:
    """W ((x - mean) / scale) + b as W' x + b'."""
    if probe.input_mean is None and probe.input_scale is None:
        return weight, bias
    wide: Float64 = weight.astype(np.float64)
    if probe.input_scale is not None:
        wide = wide / package.tensors[probe.input_scale].float32()
    moved = np.asarray(bias, np.float64)
    if probe.input_mean is not None:
        moved = moved - wide @ package.tensors[probe.input_mean].float32().astype(np.float64)
    return wide.astype(np.float32), moved.astype(np.asarray(bias).dtype)


def _logit(p: float, format: str) -> float:
    if not 0 < p < 1:
        raise NotRepresentable(format, f"a threshold of {p} on a probability")
    return math.log(p / (1 - p))
