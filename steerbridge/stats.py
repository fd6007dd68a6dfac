"""Statistics that training and evaluation share."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auroc(harmful: NDArray[np.float64], harmless: NDArray[np.float64]) -> float:
    """Area under the ROC curve: the share of (harmful, harmless) pairs in the right order."""
    both = np.concatenate([harmful, harmless])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank
    n, m = len(harmful), len(harmless)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def log_probability(logits: ArrayLike, token: int) -> float:
    """Log of softmax(logits)[token] (nats), for logits [V]."""
    values = np.asarray(logits, np.float64)
    values = values - values.max()
    return float(values[token] - np.log(np.exp(values).sum()))


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share of `count` in `total` (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, part = count / total, z * z / total
    middle = (share + part / 2) / (1 + part)
    half = z * math.sqrt(share * (1 - share) / total + part / (4 * total)) / (1 + part)
    return max(0.0, middle - half), min(1.0, middle + half)
