"""Fit probes that read every row: one score a row, the largest running score of a prompt counts.

A prompt's label says nothing about which of its rows show the harm. In training, the running scores
of a prompt are averaged with their own softmax as weights, so that the rows that score highest
learn most (Constitutional Classifiers++, arXiv 2601.04603); what is fitted is then used with the
largest one.

Shapes: R rows of a batch, one prompt behind another; B prompts; I = S * D inputs of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steerbridge.running import LEAST
from steerbridge.spec import LayerInput, LinearProbe, MlpProbe, TokenReading
from steerbridge.training.probes import Fitted, written
from steerbridge.training.states import Rows
from steerbridge_torch import rounded

SKIP: Final = 4  # attention sinks
HIDDEN: Final = 128
ROWS_PER_BATCH: Final = 6144
PROMPTS_PER_BATCH: Final = (8, 48)  # at least, at most; between them a 64th of all
EPOCHS: Final = 16  # at most
PATIENCE: Final = 3  # epochs without a better validation loss
REMEMBERED: Final = 0.996  # of the averaged weights, a step
RATE: Final = 7e-4  # of an MLP
LINEAR_RATE: Final = 5e-3
DECAY: Final = 0.1
DROPOUT: Final = (0.3, 0.5)  # of inputs, of hidden units
MASK: Final = 4  # times what is masked at once
NO_SCORE: Final = -1e4


@dataclass(frozen=True, slots=True)
class TokenDesign:
    """Where a probe reads, over how many rows, its width (0: linear), and whether it goes on in the
    answer."""

    sites: tuple[LayerInput, ...]
    window: int = 8
    hidden: int = HIDDEN
    scope: Literal["prompt", "both"] = "prompt"
    skip: int = SKIP

    def __str__(self) -> str:
        shape = f"mlp of {self.hidden}" if self.hidden else "linear"
        sites = ", ".join(map(str, self.sites))
        return f"{shape} on rows at {sites}, {self.window} at a time"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of a capture, by number, with what a fit needs to know of each."""

    index: NDArray[np.int64]
    harmful: NDArray[np.bool_]
    weight: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FittedTokens:
    """A fitted probe and how its training went."""

    probe: Fitted
    epochs: int  # of the best validation loss
    losses: tuple[tuple[float, float], ...]  # by epoch: training, validation


class _Dropout(nn.Module):
    """Dropout with stretches of one long random mask: to make a new one for every step takes most
    of the time of a fit on a CPU."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._kept = 1 - rate
        self._mask = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        size = x.numel()
        if len(self._mask) < 2 * size:
            mask = torch.empty(MASK * size, dtype=x.dtype)
            self._mask = mask.bernoulli_(self._kept).div_(self._kept)
        at = int(torch.randint(len(self._mask) - size + 1, ()))
        return x * self._mask[at : at + size].view(x.shape)


class _Net(nn.Module):
    """Scores of rows [R] from their inputs [R, I], which it standardises in place."""

    def __init__(self, inputs: int, hidden: int, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.dropout = _Dropout(DROPOUT[0])
        self.first = nn.Linear(inputs, hidden or 1)
        rest = (nn.ReLU(), _Dropout(DROPOUT[1]), nn.Linear(hidden, 1)) if hidden else ()
        self.rest = nn.Sequential(*rest)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(self.mean).div_(self.scale)
        with rounded(x.device, self.training):  # nearly all of the work
            out = self.first(self.dropout(x))
        scores: Tensor = self.rest(out.float())
        return scores[:, 0]


def running(logits_R: Tensor, starts: Tensor, window: int) -> Tensor:
    """The running score at every row [R], of rows in scope alone: see `steerbridge.running`.

    Rows that have none get `NO_SCORE`.

    Args:
        starts: where each prompt begins among the rows, and their number: [B + 1].
    """
    count = logits_R.shape[0]
    lengths = starts.diff()
    start_R = torch.repeat_interleave(starts[:-1], lengths)
    last_R = torch.repeat_interleave(starts[1:], lengths) - 1
    row = torch.arange(count)
    sums = nn.functional.pad(logits_R.double().cumsum(0), (1, 0))
    low = torch.maximum(row + 1 - window, start_R)
    size = row + 1 - low
    scores = ((sums[row + 1] - sums[low]) / size).to(logits_R.dtype)
    known = (size >= min(window, LEAST)) | (row == last_R)
    return scores.masked_fill(~known, NO_SCORE)


def pooled(scores_R: Tensor, starts: Tensor) -> Tensor:
    """The mean of each prompt's running scores, weighted with their softmax [B]; 0 without rows."""
    owner = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    most = _largest(scores_R.detach(), starts)
    weights = (scores_R - most[owner]).exp()
    total = torch.zeros(len(most)).index_add(0, owner, weights)
    scaled = torch.zeros(len(most)).index_add(0, owner, weights * scores_R)
    return scaled / total.clamp(min=1e-30)


def _largest(scores_R: Tensor, starts: Tensor) -> Tensor:
    """The largest running score of each prompt [B]; `NO_SCORE` without rows."""
    most: Tensor = torch.segment_reduce(scores_R, "max", lengths=starts.diff(), initial=NO_SCORE)
    return most


def fit(
    rows: Rows,
    train: Prompts,
    held: Prompts,
    design: TokenDesign,
    seed: int,
    *,
    epochs: int = EPOCHS,
    patience: int = PATIENCE,
    told: Callable[[int, float], None] = lambda _epoch, _loss: None,
) -> FittedTokens:
    """Fit until the loss on the held-out prompts says stop; the weights of its best epoch.

    Weights of the net are averaged over the steps (Polyak and Juditsky 1992): a single step decides
    much about the few ordinary prompts that score highest, and those decide the threshold.

    Weights of prompts are scaled so that both classes sum to the same.

    Args:
        told: called after each epoch, with its number and its validation loss.
    """
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    columns = _columns(rows, design)
    mean, scale = _moments(rows, train, design, columns)
    net = _Net(mean.shape[0], design.hidden, mean, scale)
    averaged = copy.deepcopy(net)
    rate = RATE if design.hidden else LINEAR_RATE
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=DECAY)
    weights, held_weights = _balanced(train), _balanced(held)
    batches = _batches(rows, train.index, design.skip)
    best, kept, losses, step = 0, copy.deepcopy(net.state_dict()), [], 0
    for epoch in range(epochs):
        net.train()
        total = 0.0
        for b in order.permutation(len(batches)):
            x, starts = _read(rows, train.index[batches[b]], design.skip, columns)
            scores = pooled(running(net(x), starts, design.window), starts)
            y = torch.from_numpy(train.harmful[batches[b]]).float()
            w = weights[batches[b]]
            loss = nn.functional.binary_cross_entropy_with_logits(scores, y, weight=w)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += float(loss.detach()) * len(y)
            step += 1
            _average(averaged, net, step)
        found = torch.from_numpy(_scores(averaged, rows, held.index, design, columns)).float()
        held_loss = nn.functional.binary_cross_entropy_with_logits(
            found, torch.from_numpy(held.harmful).float(), weight=held_weights
        )
        losses.append((total / len(train.index), float(held_loss)))
        told(epoch + 1, losses[-1][1])
        if losses[-1][1] <= min(loss for _, loss in losses):
            best, kept = epoch, copy.deepcopy(averaged.state_dict())
        if epoch - best >= patience:
            break
    averaged.load_state_dict(kept)
    return FittedTokens(_fitted(averaged), best + 1, tuple(losses))


def _average(averaged: nn.Module, net: nn.Module, step: int) -> None:
    """Move the averaged weights towards those of the net; faster in the first steps."""
    share = 1 - min(REMEMBERED, step / (10 + step))
    with torch.no_grad():
        for mean, now in zip(averaged.parameters(), net.parameters(), strict=True):
            mean.lerp_(now, share)


def scores(
    probe: Fitted, rows: Rows, index: Sequence[int] | NDArray[np.int64], design: TokenDesign
) -> NDArray[np.float64]:
    """The largest running score of each of the prompts [N], in log-odds; `NO_SCORE` where no row is
    in scope."""
    columns = _columns(rows, design)

    def score(x: Tensor) -> Tensor:
        return torch.from_numpy(probe.scores(x.numpy()).astype(np.float32))

    return _scores(score, rows, np.asarray(index), design, columns)


def _scores(
    score: Callable[[Tensor], Tensor],
    rows: Rows,
    index: NDArray[np.int64],
    design: TokenDesign,
    columns: list[int],
) -> NDArray[np.float64]:
    if isinstance(score, nn.Module):
        score.eval()
    found = np.empty(len(index))
    with torch.inference_mode():
        for batch in _batches(rows, index, design.skip):
            x, starts = _read(rows, index[batch], design.skip, columns)
            found[batch] = _largest(running(score(x), starts, design.window), starts).numpy()
    return found


def _columns(rows: Rows, design: TokenDesign) -> list[int]:
    """Where the design's sites lie in the rows."""
    return [rows.sites.index(site) for site in design.sites]


def _batches(rows: Rows, index: NDArray[np.int64], skip: int) -> list[NDArray[np.int64]]:
    """Positions in `index`, prompts of like length together, of a bounded size."""
    lengths = np.maximum(rows.lengths()[index] - skip, 0)
    least, most = PROMPTS_PER_BATCH
    together = min(max(least, len(index) // 64), most)
    batches: list[list[int]] = [[]]
    size = 0
    for i in np.argsort(lengths, kind="stable"):
        full = len(batches[-1]) == together or size + lengths[i] > ROWS_PER_BATCH
        if batches[-1] and full:
            batches.append([])
            size = 0
        batches[-1].append(int(i))
        size += int(lengths[i])
    return [np.asarray(batch) for batch in batches if batch]


def _read(
    rows: Rows, index: NDArray[np.int64], skip: int, columns: list[int]
) -> tuple[Tensor, Tensor]:
    """The rows in scope of some prompts [R, I], and where each prompt begins among them."""
    parts = [_of(rows, int(i), skip, columns) for i in index]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return torch.from_numpy(np.concatenate(parts)).float(), torch.from_numpy(starts)


def _of(rows: Rows, i: int, skip: int, columns: list[int]) -> NDArray[np.float16]:
    start, end = int(rows.starts[i]), int(rows.starts[i + 1])
    mine: NDArray[np.float16] = rows.array[min(start + skip, end) : end]
    if columns != list(range(mine.shape[1])):
        mine = mine[:, columns]
    return mine.reshape(len(mine), mine.shape[1] * mine.shape[2])


def _moments(
    rows: Rows, train: Prompts, design: TokenDesign, columns: list[int]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every input, over rows of a sample of the prompts."""
    some = train.index[:: max(1, len(train.index) // 2048)]
    sample = np.concatenate([_of(rows, int(i), design.skip, columns)[::3] for i in some])
    mean, scale = sample.mean(0, dtype=np.float64), sample.std(0, dtype=np.float64)
    floor = max(1e-6, 1e-3 * float(np.median(scale)))
    return torch.from_numpy(mean).float(), torch.from_numpy(np.maximum(scale, floor)).float()


def _balanced(prompts: Prompts) -> Tensor:
    """Weights with a mean of one, of which both classes have half."""
    totals = [prompts.weight[prompts.harmful == side].sum() for side in (False, True)]
    weight = prompts.weight / np.where(prompts.harmful, totals[1], totals[0]) / 2
    return torch.from_numpy(weight * len(weight)).float()


def _fitted(net: _Net) -> Fitted:
    """The probe with one output, whose first map takes standardised inputs."""
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    layers = tuple((m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linear)
    return Fitted(net.mean.numpy(), net.scale.numpy(), layers)


def blended(parts: Sequence[tuple[Fitted, float]]) -> Fitted:
    """One probe whose log-odds are those of several [.., I -> H -> 1], each times its factor, added
    up: their hidden units stand side by side."""
    mean, scale = parts[0][0].mean, parts[0][0].scale
    inner: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    outer = []
    bias = np.zeros(1)
    for probe, factor in parts:
        *hidden, (last, shift) = probe.layers
        first, offset = hidden[0] if hidden else (factor * last, factor * shift)
        # Inputs are standardised as those of the first probe are.
        wide = np.asarray(first, np.float64) / probe.scale
        offset = offset + wide @ (mean.astype(np.float64) - probe.mean)
        inner.append((np.asarray(wide * scale, np.float32), np.asarray(offset, np.float32)))
        outer.append(factor * last)
        bias += factor * shift
    if len(parts[0][0].layers) == 1:
        whole = np.sum([w for w, _ in inner], axis=0), np.sum([b for _, b in inner], axis=0)
        return Fitted(mean, scale, (whole,))
    side = np.concatenate([w for w, _ in inner]), np.concatenate([b for _, b in inner])
    end = np.concatenate(outer, axis=1).astype(np.float32), bias.astype(np.float32)
    return Fitted(mean, scale, (side, end))


def to_spec(
    fitted: Fitted, design: TokenDesign, threshold: float, probe: str
) -> tuple[LinearProbe | MlpProbe, dict[str, Any]]:
    """The probe as spec and tensors. `threshold` is in log-odds; the spec's in probability."""
    reading = TokenReading(
        sites=design.sites,
        scope=design.scope,
        window=design.window,
        skip=design.skip,
        rows="all",
    )
    return written(fitted, {"token_reading": reading}, threshold, probe)
