"""Fit probes on captured readings.

Shapes: N examples, I = K * D inputs of a probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from steerbridge.spec import (
    DenseLayer,
    LinearProbe,
    MlpProbe,
    Reading,
    Sigmoid,
    Softmax,
)
from steerbridge.tensors import Float32, Tensor
from steerbridge.training.settings import Shape

HIDDEN = 64  # width of the paper's probe


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained probe on standardised inputs: a stack of (weight [out, in], bias [out])."""

    mean: Float32
    scale: Float32
    layers: tuple[tuple[Float32, Float32], ...]

    def scores(self, x_NI: Float32) -> NDArray[np.float64]:
        """Log-odds of harm [N]."""
        y: Any = _standardised(x_NI, self.mean, self.scale)
        for i, (weight, bias) in enumerate(self.layers):
            y = (np.maximum(y, 0) if i else y) @ weight.T + bias
        odds = y[:, 0] - y[:, 1] if y.shape[1] == 2 else y[:, 0]
        return np.asarray(odds, np.float64)

    def rescaled(self, slope: float, shift: float) -> Fitted:
        """The probe with log-odds slope * y + shift: the same decisions on another scale."""
        *inner, (weight, bias) = self.layers
        moved = slope * bias
        moved[0] += shift  # class 0 of two, or the only output
        last = np.asarray(slope * weight, np.float32), np.asarray(moved, np.float32)
        return Fitted(self.mean, self.scale, (*inner, last))


@dataclass(frozen=True, slots=True)
class ProbeDesign:
    """Where a probe reads, its shape and how strongly it is regularised."""

    readings: tuple[Reading, ...]
    shape: Shape
    decay: float

    def __str__(self) -> str:
        return f"{self.shape} on {', '.join(map(str, self.readings))}, decay {self.decay:g}"


def fit(
    x_NI: Float32,
    harmful_N: NDArray[np.bool_],
    weight_N: NDArray[np.float64],
    design: ProbeDesign,
    seed: int,
) -> Fitted:
    """Minimise the weighted, class-balanced cross-entropy plus decay * |weights|^2 (L-BFGS).

    Inputs that are NaN (a missing image) count as their mean.
    """
    mean = np.asarray(np.nanmean(x_NI, axis=0, dtype=np.float64), np.float32)
    spread = np.nanstd(x_NI, axis=0, dtype=np.float64)
    scale = np.asarray(np.maximum(spread, 1e-6), np.float32)
    x = torch.from_numpy(_standardised(x_NI, mean, scale))
    y = torch.from_numpy(harmful_N.astype(np.int64))
    net = _network(x.shape[1], design.shape, seed)
    weights = [p for p in net.parameters() if p.dim() == 2]
    sample = torch.from_numpy(_balanced(weight_N, harmful_N))
    optimiser = torch.optim.LBFGS(
        net.parameters(), max_iter=150, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        out = net(x)
        # Class 0 is harm, as in the authors' checkpoints; a linear probe has one output.
        odds = out[:, 0] - out[:, 1] if out.shape[1] == 2 else out[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(
            odds, y.float(), weight=sample, reduction="sum"
        )
        loss = loss + design.decay * torch.stack([(w * w).sum() for w in weights]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    parts = [m for m in net if isinstance(m, nn.Linear)]
    return Fitted(
        mean, scale, tuple((m.weight.detach().numpy(), m.bias.detach().numpy()) for m in parts)
    )


def _standardised(x_NI: Float32, mean: Float32, scale: Float32) -> Float32:
    """(x - mean) / scale, 0 where an image is missing: what every runtime computes."""
    x = (x_NI - mean) / scale
    x[np.isnan(x)] = 0
    return x


def _balanced(weight_N: NDArray[np.float64], harmful_N: NDArray[np.bool_]) -> Float32:
    """Weights scaled so that both classes sum to one half."""
    total = np.where(harmful_N, weight_N[harmful_N].sum(), weight_N[~harmful_N].sum())
    return np.asarray(weight_N / total / 2, np.float32)


def _network(inputs: int, shape: Shape, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    if shape == "mlp":
        return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    linear = nn.Linear(inputs, 1)
    nn.init.zeros_(linear.weight)  # convex: start where the seed cannot matter
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear)


def platt(
    scores_N: NDArray[np.float64],
    harmful_N: NDArray[np.bool_],
    weight_N: NDArray[np.float64],
    steps: int = 50,
) -> tuple[float, float]:
    """(slope, shift) that make log-odds of prompts that were not trained on calibrated (Platt 1999,
    with his targets, so that labels which are told apart without a mistake do not give an infinite
    slope), classes balanced.

    A probe is far surer of the examples that it was fitted on; without this, thresholds lie at
    0.999 and more, where probabilities have no digits left.
    """
    w = _balanced(weight_N, harmful_N).astype(np.float64)
    x = np.stack([scores_N, np.ones_like(scores_N)])
    theta = np.array([1.0, 0.0])
    counts = [int((harmful_N == side).sum()) for side in (False, True)]
    target = np.where(harmful_N, (counts[1] + 1) / (counts[1] + 2), 1 / (counts[0] + 2))
    for _ in range(steps):  # Newton; convex in two variables
        p = 1 / (1 + np.exp(-np.clip(theta @ x, -500, 500)))
        gradient = x @ (w * (p - target)) + 1e-9 * theta
        hessian = (x * (w * p * (1 - p))) @ x.T + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        theta = theta - step / max(1.0, float(np.abs(step).max()))
    return float(max(theta[0], 1e-3)), float(theta[1])


# ---------------------------------------------------------------- into the package


def to_spec(
    fitted: Fitted, design: ProbeDesign, threshold: float, probe: str
) -> tuple[LinearProbe | MlpProbe, dict[str, Tensor]]:
    """The probe as spec and tensors. `threshold` is in log-odds; the spec's in probability."""
    return written(fitted, {"readings": design.readings}, threshold, probe)


def written(
    fitted: Fitted, reads: Mapping[str, Any], threshold: float, probe: str
) -> tuple[LinearProbe | MlpProbe, dict[str, Tensor]]:
    """The probe as spec and tensors; `reads` are the fields that say what it reads."""
    tensors = {
        f"{probe}.mean": Tensor.of(fitted.mean),
        f"{probe}.scale": Tensor.of(fitted.scale),
    }
    common: dict[str, Any] = {
        "id": probe,
        **reads,
        "input_mean": f"{probe}.mean",
        "input_scale": f"{probe}.scale",
        "comparator": ">",
        "threshold": float(1 / (1 + np.exp(-threshold))),
    }
    if len(fitted.layers) == 1:
        ((weight, bias),) = fitted.layers
        tensors[f"{probe}.weight"] = Tensor.of(weight[0])
        made: LinearProbe | MlpProbe = LinearProbe(
            type="linear", weight=f"{probe}.weight", bias=float(bias[0]), link="sigmoid", **common
        )
        return made, tensors
    layers = []
    for i, (weight, bias) in enumerate(fitted.layers):
        layer = DenseLayer(weight=f"{probe}.{i}.weight", bias=f"{probe}.{i}.bias")
        tensors |= {layer.weight: Tensor.of(weight), layer.bias: Tensor.of(bias)}
        layers.append(layer)
    output: Softmax | Sigmoid = Sigmoid(type="sigmoid", harmful_when="high")
    if len(fitted.layers[-1][1]) == 2:
        output = Softmax(type="softmax", classes=("harmful", "harmless"), harmful="harmful")
    made = MlpProbe(type="mlp", layers=tuple(layers), activation="relu", output=output, **common)
    return made, tensors
