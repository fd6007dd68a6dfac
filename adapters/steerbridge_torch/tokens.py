"""Token readings in torch: from the states of rows to their logits, running scores and where a
probe fired, for all rows of a pass at once.

`steerbridge.running` says what a running score is; here the same numbers come out, bit for bit on a
CPU. Every result is kept by column, so taking rows back needs no work: a pass that begins at a
column goes on from what was there before it.

Shapes: B rows of the batch, Q columns of one pass, C columns so far, S sites of a probe, D hidden
size.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from steerbridge.reference import window
from steerbridge.spec import LinearProbe, MlpProbe, Softmax
from steerbridge_torch.kernels import ACTIVATIONS, Weights, exact

NEVER: Final = 1 << 40
"""The column of what did not happen."""

_LEAST_ROOM: Final = 256
_WINDOW_VALUES: Final = 1 << 22  # of windows that are summed at once


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class RowLogits:
    """Logits of harm of rows, summed up site by site, so that no row need be kept.

    The first affine map takes the standardisation in: weight / scale, bias - mean weight / scale.
    """

    def __init__(self, probe: Any, weights: Weights) -> None:
        self._probe, self._weights = probe, weights
        self._folded: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @exact
    def part(self, site: int, h_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """What a site adds [B, Q, H] to the first map, and which rows of it are finite [B, Q]."""
        weight, bias = self._first(h_BQD.device)
        x = h_BQD.float()
        size = x.shape[-1]
        part = functional.linear(
            x, weight[:, site * size : (site + 1) * size], bias if site == 0 else None
        )
        return part, (x - x).sum(dim=-1) == 0

    @exact
    def logits(self, total_BQH: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of harm [B, Q] of the summed parts, and whether all outputs are finite [B, Q]."""
        probe, y = self._probe, total_BQH
        if isinstance(probe, MlpProbe):
            for layer in probe.layers[1:]:
                y = functional.linear(
                    ACTIVATIONS[probe.activation](y),
                    self._weights(layer.weight, y.device),
                    self._weights(layer.bias, y.device),
                )
        sound = (y - y).sum(dim=-1) == 0
        if isinstance(probe, MlpProbe) and isinstance(probe.output, Softmax):
            at = probe.output.classes.index(probe.output.harmful)
            others = torch.cat([y[..., :at], y[..., at + 1 :]], dim=-1)
            return y[..., at] - others.logsumexp(dim=-1), sound
        low = isinstance(probe, MlpProbe) and probe.output.harmful_when == "low"  # type: ignore[union-attr]
        return (-y[..., 0] if low else y[..., 0]), sound

    def _first(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first map on standardised inputs as one on inputs as they are."""
        if device not in self._folded:
            probe, weights = self._probe, self._weights
            cpu = torch.device("cpu")
            if isinstance(probe, LinearProbe):
                weight = weights(probe.weight, cpu).double()[None]
                bias = torch.tensor([probe.bias], dtype=torch.float64)
            else:
                weight = weights(probe.layers[0].weight, cpu).double()
                bias = weights(probe.layers[0].bias, cpu).double()
            if probe.input_scale is not None:
                weight = weight / weights(probe.input_scale, cpu).double()
            if probe.input_mean is not None:
                bias = bias - weight @ weights(probe.input_mean, cpu).double()
            self._folded[device] = (weight.float().to(device), bias.float().to(device))
        return self._folded[device]


class RowScores:
    """Kept logits of the rows of a batch, and what follows from them, by column.

    Args:
        probe: one with a token reading; its threshold decides where it fires.
        rows: B.
    """

    def __init__(self, probe: Any, rows: int, device: torch.device) -> None:
        self._probe = probe
        self._over = window(probe.token_reading)
        self._columns = 0
        self._wide = wide(device)
        self._limit = torch.tensor(probe.threshold, dtype=self._wide, device=device)
        self._steps = torch.arange(self._over.size, device=device)
        pad = self._over.size - 1

        def full(columns: int, value: Any, dtype: torch.dtype) -> Tensor:
            return torch.full((rows, columns), value, dtype=dtype, device=device)

        # In scope, in order, behind a window of zeros; the last place is for all other rows.
        self._kept = full(pad + _LEAST_ROOM + 1, 0.0, torch.float32)
        self._ranks = full(_LEAST_ROOM, 0, torch.int64)  # rows in scope so far
        self._best = full(_LEAST_ROOM, -math.inf, self._wide)  # the largest running score so far
        self._broken = full(_LEAST_ROOM, False, torch.bool)  # some row so far is not sound
        self._fired = full(1, NEVER, torch.int64)[:, 0]  # the first column

    def add(
        self, start: int, logits_BQ: Tensor, sound_BQ: Tensor, inside_BQ: Tensor, ends_BQ: Tensor
    ) -> None:
        """The rows of a pass; those that were there from column `start` on are taken back.

        Args:
            sound_BQ: whether states and outputs of a row are finite.
            inside_BQ: rows in scope.
            ends_BQ: prompt ends at which a short prompt has the mean of what there is.
        """
        self._room(start + logits_BQ.shape[1])
        size, pad = self._over.size, self._over.size - 1
        ranks = self._before(self._ranks, start, 0) + inside_BQ.cumsum(dim=1)
        nowhere = self._kept.shape[1] - 1
        self._kept.scatter_(
            1, torch.where(inside_BQ, ranks + (pad - 1), nowhere), logits_BQ.float()
        )
        means = self._sums(ranks) / ranks.clamp(1, size)
        least = self._over.least
        known = (inside_BQ & (ranks >= least)) | (ends_BQ & (ranks > 0) & (ranks < least))
        scores = torch.where(known, means, -math.inf)
        best = torch.maximum(
            self._before(self._best, start, -math.inf), scores.cummax(dim=1).values
        )
        broken = (inside_BQ & ~sound_BQ).cumsum(dim=1) > 0
        broken |= self._before(self._broken, start, False)
        stop = start + logits_BQ.shape[1]
        for kept, new in ((self._ranks, ranks), (self._best, best), (self._broken, broken)):
            kept[:, start:stop] = new
        self._columns = stop
        fired = self._fires(best, broken)
        first = start + fired.int().argmax(dim=1)
        now = torch.where(fired.any(dim=1), first, NEVER)
        self._fired = torch.where(self._fired < start, self._fired, now)

    def _before(self, kept: Tensor, start: int, nothing: Any) -> Tensor:
        """What is known [B, 1] in front of a column."""
        at = min(start, self._columns)
        return kept[:, at - 1 : at] if at else torch.full_like(kept[:, :1], nothing)

    def _sums(self, ranks_BQ: Tensor) -> Tensor:
        """Sums over the windows that end at these ranks, from the oldest logit to the newest."""
        rows, width = ranks_BQ.shape
        together = max(1, _WINDOW_VALUES // (rows * self._over.size))
        parts = []
        for at in range(0, width, together):
            first = (ranks_BQ[:, at : at + together] - 1).clamp(min=0)
            places = (first[..., None] + self._steps).flatten(1)
            values = self._kept.gather(1, places).to(self._wide)
            values = values.view(rows, -1, self._over.size)
            parts.append(values.cumsum(dim=-1)[..., -1])
        return torch.cat(parts, dim=1)

    def _fires(self, best: Tensor, broken: Tensor) -> Tensor:
        # As `reference.fires_at`: > or >=; before a running score there is nothing to compare.
        score = squash(best)
        above = self._probe.comparator == ">"
        crossed = score > self._limit if above else score >= self._limit
        return (crossed & (best > -math.inf)) | broken

    def _room(self, columns: int) -> None:
        """Grow by doubling."""
        have = self._ranks.shape[1]
        if columns <= have:
            return
        more = max(columns, 2 * have) - have
        self._kept = functional.pad(self._kept[:, :-1], (0, more + 1))
        self._ranks = functional.pad(self._ranks, (0, more))
        self._best = functional.pad(self._best, (0, more), value=-math.inf)
        self._broken = functional.pad(self._broken, (0, more))

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was: beams."""
        at = rows.to(self._ranks.device)
        self._kept, self._ranks, self._best, self._broken, self._fired = (
            kept.index_select(0, at)
            for kept in (self._kept, self._ranks, self._best, self._broken, self._fired)
        )

    def fired(self) -> Tensor:
        """The first column [B] at which the probe fired, on the CPU; `NEVER`."""
        return self._fired.cpu()

    def scores_at(self, columns_B: Tensor) -> Tensor:
        """The probe's score [B] behind these columns, on the CPU; NaN while there is none, or if a
        row was not sound."""
        at = columns_B.to(self._best.device).clamp(0, max(self._columns, 1) - 1)[:, None]
        best, broken = self._best.gather(1, at)[:, 0], self._broken.gather(1, at)[:, 0]
        unknown = broken | (best == -math.inf)
        return torch.where(unknown, math.nan, squash(best)).cpu().double()

    def sound_at(self, columns_B: Tensor) -> Tensor:
        """Whether all rows in scope up to these columns were sound [B], on the CPU."""
        at = columns_B.to(self._best.device).clamp(0, max(self._columns, 1) - 1)[:, None]
        return ~self._broken.gather(1, at)[:, 0].cpu()

    def snapshot(self, row: int) -> tuple[int, float, bool]:
        """Column where it fired, the score now (NaN: none) and soundness of one row."""
        last = torch.full((len(self._fired),), self._columns - 1)
        return (
            int(self._fired[row]),
            float(self.scores_at(last)[row]),
            bool(self.sound_at(last)[row]),
        )


def squash(logits: Tensor) -> Tensor:
    """As `reference.running_score`."""
    return 0.5 * (1 + torch.tanh(0.5 * logits))
