"""Train the refusal head on cached states.

The language model is frozen and the head acts after the final norm, so the states under the
teacher-forced refusal do not depend on W. They are captured once; then W minimises the exact
cross-entropy of softcap(E (h + eps W h) + b) on them. The authors run the whole model in
every step and multiply the whole output embedding by W for every token.

Shapes: N prompts, T tokens of the refusal, M = N * T states, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steerbridge.errors import DataError, Problem
from steerbridge.runtime import OutputHead
from steerbridge.tensors import Float32


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How the head is trained. `decay` pulls W towards zero, that is towards no steering."""

    eps: float = 0.1
    steps: int = 120
    batch: int = 20  # prompts per step, each with all tokens of the refusal
    learning_rate: float = 0.03
    decay: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """W [D, D] with the loss over all states before and after."""

    matrix: Float32
    eps: float
    loss_before: float
    loss_after: float


def train_head(
    states_NTD: Float32,
    target_T: NDArray[np.int64],
    head: OutputHead,
    settings: HeadSettings,
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
) -> TrainedHead:
    """Fit W so that the tokens `target_T` follow from each prompt's states; convex in W.

    Raises:
        DataError: no states, or states that are not finite.
    """
    if len(states_NTD) == 0 or not np.isfinite(states_NTD).all():
        raise DataError(Problem("states of the refusal", "finite rows", str(states_NTD.shape)))
    h, target = torch.from_numpy(states_NTD), torch.from_numpy(target_T)
    logits = Logits(head)

    def loss_of_batch(w: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        rows = h[prompts].flatten(0, 1)
        steered = rows + settings.eps * rows @ w.T
        wanted = target.repeat(len(prompts))
        return torch.nn.functional.cross_entropy(logits(steered), wanted)

    matrix = descend(loss_of_batch, len(h), h.shape[2], settings, settings.steps, progress)
    flat, labels = h.flatten(0, 1), target.repeat(len(h))
    before = loss_of(flat, labels, None, settings.eps, logits)
    after = loss_of(flat, labels, matrix, settings.eps, logits)
    return TrainedHead(matrix.numpy(), settings.eps, before, after)


def descend(
    loss_of_batch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: int,
    width: int,
    settings: HeadSettings,
    steps: int,
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
) -> torch.Tensor:
    """Adam from W = 0 with a cosine schedule over `settings.steps`; runs `steps` of them.

    `loss_of_batch(w, indices of prompts)` is where the states come from: a cache here, the
    whole model in the loop that `make bench-train` compares with.
    """
    torch.manual_seed(settings.seed)
    w = torch.zeros(width, width, requires_grad=True)
    optimiser = torch.optim.Adam([w], settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        while len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(prompts)])
        batch, order = order[: settings.batch], order[settings.batch :]
        loss = loss_of_batch(w, batch)
        optimiser.zero_grad()
        (loss + settings.decay * (w * w).sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        progress(step + 1, float(loss.detach()))
    return w.detach()


class Logits:
    """The frozen output head in torch: softcap(weight h + bias)."""

    def __init__(self, head: OutputHead) -> None:
        self._weight = torch.from_numpy(np.asarray(head.weight, np.float32))
        self._bias = None if head.bias is None else torch.from_numpy(head.bias)
        self._softcap = head.softcap

    def __call__(self, h_MD: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(h_MD, self._weight, self._bias)
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits


def loss_of(
    h_MD: torch.Tensor,
    target_M: torch.Tensor,
    w: torch.Tensor | None,
    eps: float,
    logits: Logits,
    rows: int = 1024,
) -> float:
    """Mean cross-entropy over all states, in bounded memory."""
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(h_MD), rows):
            h = h_MD[i : i + rows]
            steered = h if w is None else h + eps * h @ w.T
            part = torch.nn.functional.cross_entropy(
                logits(steered), target_M[i : i + rows], reduction="sum"
            )
            total += float(part)
    return total / len(h_MD)


@dataclass(frozen=True, slots=True)
class LowRank:
    """W ~ u v with the relative Frobenius norm of what was cut off."""

    u: Float32  # [D, R]
    v: Float32  # [R, D]
    error: float


def low_rank(matrix_DD: Float32, rank: int) -> LowRank:
    """The best approximation of this rank (Eckart-Young), singular values split evenly.

    Raises:
        ValueError: rank outside 1..D.
    """
    d = len(matrix_DD)
    if not 1 <= rank <= d:
        raise ValueError(f"rank must be in 1..{d}, found {rank}")
    left, values, right = np.linalg.svd(matrix_DD.astype(np.float64))
    root = np.sqrt(values[:rank])
    kept = float((values[rank:] ** 2).sum() / max((values**2).sum(), 1e-300))
    return LowRank(
        np.ascontiguousarray(left[:, :rank] * root, np.float32),
        np.ascontiguousarray(right[:rank] * root[:, None], np.float32),
        float(np.sqrt(kept)),
    )


def difference_of_means(harmful_ND: Float32, harmless_ND: Float32) -> Float32:
    """Unit vector from the harmless to the harmful mean: what `project_out` removes.

    Raises:
        DataError: the means are equal.
    """
    difference = harmful_ND.mean(axis=0, dtype=np.float64) - harmless_ND.mean(
        axis=0, dtype=np.float64
    )
    norm = float(np.linalg.norm(difference))
    if norm == 0:
        raise DataError(Problem("difference of means", "a vector that is not zero", "zero"))
    return np.asarray(difference / norm, np.float32)
