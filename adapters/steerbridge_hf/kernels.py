"""The reference semantics in torch, batched over requests.

Arithmetic is float32 whatever the model's dtype; results are cast back. Tensors follow the
hidden states to their device, once per device.

Shapes: B rows of the batch, Q columns of one forward pass, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    AddVector,
    CosineProbe,
    DenseMatrix,
    HeadMatrix,
    ImageMean,
    LinearProbe,
    MlpProbe,
    Softmax,
)


class Weights:
    """The package's tensors as float32, copied to each device on first use."""

    def __init__(self, package: SteeringPackage) -> None:
        self._package = package
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(self, name: str, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._copies:
            values = self._package.tensors[name].float32()
            self._copies[key] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._copies[key]


def score(probe: Any, weights: Weights, x_BI: Tensor, missing_B: Tensor) -> Tensor:
    """Scores [B] of probe inputs; rows of `missing_B` had no image to read."""
    device = x_BI.device
    if probe.input_mean is not None:
        x_BI = x_BI - weights(probe.input_mean, device)
    if probe.input_scale is not None:
        x_BI = x_BI / weights(probe.input_scale, device)
    width = x_BI.shape[1] // len(probe.readings)
    for k, reading in enumerate(probe.readings):
        if isinstance(reading.position, ImageMean):
            part = x_BI[:, k * width : (k + 1) * width]
            part.masked_fill_(missing_B[:, None], 0.0)
    match probe:
        case LinearProbe():
            y = x_BI @ weights(probe.weight, device) + probe.bias
            return y if probe.link == "identity" else torch.sigmoid(y)
        case CosineProbe():
            return _cosine(probe, weights, x_BI)
        case MlpProbe():
            return _mlp(probe, weights, x_BI)
    raise TypeError(f"unknown probe {probe!r}")


def _cosine(probe: CosineProbe, weights: Weights, x: Tensor) -> Tensor:
    c = weights(probe.direction, x.device)
    projected = torch.outer(x @ c / (c @ c), c)
    if probe.squash == "tanh":
        projected = torch.tanh(projected)
    norms = x.norm(dim=1) * projected.norm(dim=1)
    dots = (x * projected).sum(dim=1)
    return torch.where(norms == 0, torch.zeros_like(dots), dots / norms)


_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": functional.gelu}


def _mlp(probe: MlpProbe, weights: Weights, x: Tensor) -> Tensor:
    for i, layer in enumerate(probe.layers):
        if i:
            x = _ACTIVATIONS[probe.activation](x)
        x = functional.linear(x, weights(layer.weight, x.device), weights(layer.bias, x.device))
    if isinstance(probe.output, Softmax):
        return torch.softmax(x, dim=1)[:, probe.output.classes.index(probe.output.harmful)]
    high = torch.sigmoid(x[:, 0])
    return high if probe.output.harmful_when == "high" else 1 - high


def fires(probe: Any, scores_B: Tensor) -> Tensor:
    """Which scores fire, non-finite ones included ([B] bool)."""
    # The threshold is a float64 of the spec; comparing in float64 keeps >= exact.
    values = scores_B.double()
    compare = {">": torch.gt, ">=": torch.ge, "<": torch.lt, "<=": torch.le}[probe.comparator]
    return ~torch.isfinite(values) | compare(values, probe.threshold)


def apply(
    intervention: Any, target: int | None, weights: Weights, h: Tensor, strength: Tensor
) -> Tensor:
    """Hidden states [B, Q, D] after one act; `strength` [B] float32."""
    x = h.float()
    factor = strength[:, None, None]
    if isinstance(intervention, HeadMatrix):
        delta = factor * intervention.eps * _head_product(intervention, weights, x)
    else:
        assert target is not None
        v = weights(intervention.targets[target].vector, h.device)
        along: Any = 1.0 if isinstance(intervention, AddVector) else -(x @ v)[..., None]
        delta = factor * intervention.alpha * along * v
    return (x + delta).to(h.dtype)


def _head_product(head: HeadMatrix, weights: Weights, x: Tensor) -> Tensor:
    if isinstance(head.weight, DenseMatrix):
        return functional.linear(x, weights(head.weight.matrix, x.device))
    low = functional.linear(x, weights(head.weight.v, x.device))
    return functional.linear(low, weights(head.weight.u, x.device))
