"""Train the refusal head on cached states.

The language model is frozen and the head acts after the final norm, so the states under the
teacher-forced refusal do not depend on W. They are captured once; then W minimises the exact
cross-entropy of softcap(s (E (h + eps W h) + b)) on them. The authors run the whole model in
every step and multiply the whole output embedding by W for every token.

Shapes: N prompts, T tokens of the refusal, M = N * T states, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steerbridge.errors import DataError, Problem
from steerbridge.runtime import OutputHead, Progress
from steerbridge.tensors import Float32
from steerbridge.training.settings import HeadSettings


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """W [D, D] with the loss over all states before and after, and that of each step's batch."""

    matrix: Float32
    eps: float
    loss_before: float
    loss_after: float
    losses: tuple[float, ...]


def train_head(
    states_NTD: Float32,
    target_T: NDArray[np.int64],
    head: OutputHead,
    settings: HeadSettings,
    progress: Progress | None = None,
) -> TrainedHead:
    """Fit W so that the tokens `target_T` follow from each prompt's states; convex in W.

    Raises:
        DataError: no states, or states that are not finite.
    """
    if len(states_NTD) == 0 or not np.isfinite(states_NTD).all():
        raise DataError(Problem("states of the refusal", "finite rows", str(states_NTD.shape)))
    h, target = torch.from_numpy(states_NTD), torch.from_numpy(target_T)
    loss = HeadLoss(head)

    def loss_of_batch(w: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        rows = h[prompts].flatten(0, 1)
        steered = rows + settings.eps * rows @ w.T
        wanted = target.repeat(len(prompts))
        return loss(steered, wanted)

    matrix, losses = descend(loss_of_batch, len(h), h.shape[2], settings, settings.steps, progress)
    flat, labels = h.flatten(0, 1), target.repeat(len(h))
    before = loss_of(flat, labels, None, settings.eps, loss)
    after = loss_of(flat, labels, matrix, settings.eps, loss)
    return TrainedHead(matrix.numpy(), settings.eps, before, after, tuple(losses))


def descend(
    loss_of_batch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: int,
    width: int,
    settings: HeadSettings,
    steps: int,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, list[float]]:
    """Adam from W = 0 with a cosine schedule over `settings.steps`; runs `steps` of them.

    `loss_of_batch(w, indices of prompts)` is where the states come from: a cache here, the
    whole model in the loop that `make bench-train` compares with.

    Returns:
        W [D, D], and the loss of each step's batch.
    """
    torch.manual_seed(settings.seed)
    w = torch.zeros(width, width, requires_grad=True)
    optimiser = torch.optim.Adam([w], settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    order = torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    for step in range(steps):
        while len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(prompts)])
        batch, order = order[: settings.batch], order[settings.batch :]
        loss = loss_of_batch(w, batch)
        optimiser.zero_grad()
        (loss + settings.decay * (w * w).sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress:
            progress("head", step + 1, settings.steps)
    return w.detach(), losses


class HeadLoss:
    """Mean cross-entropy of softcap(s (E h + b)), differentiable in h only.

    The gradient, s E^T (softmax - onehot), is computed beside the loss in one buffer of logits that
    every step uses again; the default autograd path reads and writes the logits several times
    more, which takes longer than the multiplications.
    """

    def __init__(self, head: OutputHead) -> None:
        self._weight_VD = torch.from_numpy(np.asarray(head.weight, np.float32))
        self._bias = None if head.bias is None else torch.from_numpy(head.bias)
        self._softcap, self._scale = head.softcap, head.scale
        self._logits = torch.empty(0)

    def __call__(self, h_MD: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = _WithGradient.apply(h_MD, self, target_M)  # type: ignore[no-untyped-call]
        return loss

    def value(self, h_MD: torch.Tensor, target_M: torch.Tensor) -> float:
        """The loss alone."""
        return float(torch.nn.functional.cross_entropy(self._outputs(h_MD)[0], target_M))

    def value_and_gradient(
        self, h_MD: torch.Tensor, target_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and its derivative by h [M, D]."""
        z, slope = self._outputs(h_MD)
        wanted = target_M[:, None]
        highest, chosen = z.amax(dim=1, keepdim=True), z.gather(1, wanted)
        # What is this small adds nothing in float32; smaller still, as a subnormal number, it
        # would slow the multiplication down.
        z.sub_(highest).clamp_(min=-60).exp_()
        total = z.sum(dim=1, keepdim=True)
        loss = (total.log() + highest - chosen).mean()
        onehot = self._weight_VD[target_M]
        if slope is not None:
            z.mul_(slope)
            onehot = onehot * slope.gather(1, wanted)
        gradient = (z @ self._weight_VD).div_(total).sub_(onehot).mul_(self._scale / len(h_MD))
        return loss, gradient

    def _outputs(self, h_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [M, V] in the buffer, and what the soft cap multiplies a gradient with."""
        size = (len(h_MD), len(self._weight_VD))
        if self._logits.shape[:1] < size[:1]:
            self._logits = torch.empty(size)
        z = torch.mm(h_MD, self._weight_VD.T, out=self._logits[: size[0]])
        if self._bias is not None:
            z.add_(self._bias)
        if self._scale != 1:
            z.mul_(self._scale)
        if not self._softcap:
            return z, None
        z.div_(self._softcap).tanh_()
        slope = 1 - z.square()
        return z.mul_(self._softcap), slope


class _WithGradient(torch.autograd.Function):
    """HeadLoss for autograd: the gradient is known before it is asked for."""

    @staticmethod
    def forward(
        ctx: Any, h_MD: torch.Tensor, loss: HeadLoss, target_M: torch.Tensor
    ) -> torch.Tensor:
        value, gradient = loss.value_and_gradient(h_MD.detach(), target_M)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None


def loss_of(
    h_MD: torch.Tensor,
    target_M: torch.Tensor,
    w: torch.Tensor | None,
    eps: float,
    loss: HeadLoss,
    rows: int = 256,
) -> float:
    """Mean cross-entropy over all states, in bounded memory."""
    total = 0.0
    for i in range(0, len(h_MD), rows):
        h = h_MD[i : i + rows]
        steered = h if w is None else h + eps * h @ w.T
        total += loss.value(steered, target_M[i : i + rows]) * len(h)
    return total / len(h_MD)


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
