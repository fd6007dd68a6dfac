"""Running scores over the rows of a sequence: what a token reading makes of its rows' logits.

Two forms that are equal bit for bit given the same logits: `running_scores` over whole arrays, and
`Rows`, to which the rows of an answer come and from which they may be taken back. The meaning of
each term is that of the format's page.

Shapes: T rows of one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST: Final = 4
"""Rows that a running score needs, or as many as its window has."""

Scope = Literal["prompt", "answer", "both"]


@dataclass(frozen=True, slots=True)
class Window:
    """Which rows count, and over how many of them a running score is the mean.

    Attributes:
        size: rows in scope.
        skip: rows at the start of the sequence that are left out: attention sinks.
    """

    size: int
    skip: int = 0
    scope: Scope = "both"

    @property
    def least(self) -> int:
        """Rows in scope that a running score needs."""
        return min(self.size, LEAST)

    def in_scope(self, counted_T: NDArray[np.bool_], end: int | None) -> NDArray[np.bool_]:
        """Which of the rows are in scope.

        Args:
            counted_T: rows of the reading's kind (text, image or all).
            end: the row of the prompt's end; None while all rows are the prompt's.
        """
        rows = np.arange(len(counted_T))
        inside = counted_T & (rows >= self.skip)
        if self.scope == "both":
            return inside
        in_prompt = np.ones_like(inside) if end is None else rows <= end
        return inside & (in_prompt if self.scope == "prompt" else ~in_prompt)


def running_scores(
    window: Window, logits_T: ArrayLike, counted_T: ArrayLike, end: int | None
) -> NDArray[np.float64]:
    """The running score [T] at each row; NaN at rows that have none.

    The mean of the last `window.size` logits in scope, each float32, summed in float64 from the
    oldest to the newest. There must be `LEAST` of them, or a whole window; a shorter prompt has the
    mean of what there is at its end, whatever kind of row that is.
    """
    logits = np.asarray(logits_T, np.float32)
    inside = np.flatnonzero(window.in_scope(np.asarray(counted_T, np.bool_), end))
    scores = np.full(len(logits), np.nan)
    means, counts = _means(logits[inside], window.size)
    known = counts >= window.least
    scores[inside[known]] = means[known]
    if end is not None and window.scope != "answer":
        until = np.searchsorted(inside, end, side="right")
        if 0 < until < window.least:
            scores[end] = means[until - 1]
    return scores


def _means(
    logits_N: NDArray[np.float32], size: int
) -> tuple[NDArray[np.float64], NDArray[np.int_]]:
    """The mean of each value and those before it, `size` at most, and how many these are."""
    before = np.zeros(size - 1)
    windows = (
        np.lib.stride_tricks.sliding_window_view(
            np.concatenate([before, logits_N.astype(np.float64)]), size
        )
        if len(logits_N)
        else np.empty((0, size))
    )
    total = np.zeros(len(logits_N))
    for column in windows.T:  # from the oldest; a zero before the first one changes nothing
        total = total + column
    counts = np.minimum(np.arange(1, len(logits_N) + 1), size)
    return total / counts, counts


class Rows:
    """The running scores of one sequence whose prompt is known, and whose answer comes bit by bit.

    Rows may be taken back: guesses that were rejected, and what is evaluated again.

    Args:
        logits_T, counted_T: of the prompt's rows.
    """

    def __init__(self, window: Window, logits_T: ArrayLike, counted_T: ArrayLike) -> None:
        self.window = window
        logits, counted = np.asarray(logits_T, np.float32), np.asarray(counted_T, np.bool_)
        self.end = end = len(logits) - 1
        inside = window.in_scope(counted, end)
        scores = running_scores(window, logits, counted, end)
        self._inside: list[float] = logits[inside].tolist()  # logits in scope
        self._ranks: list[int] = np.cumsum(inside).tolist()  # of them so far, by row
        self._scores: list[float] = scores.tolist()
        self._best: list[float] = np.fmax.accumulate(scores).tolist()

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, logits: ArrayLike, counted: ArrayLike) -> None:
        """Rows of the next pass, in order: a few."""
        values = np.asarray(logits, np.float32).tolist()
        for logit, counts in zip(values, np.asarray(counted).tolist(), strict=True):
            inside = self.is_inside(len(self), counts)
            if inside:
                self._inside.append(logit)
            self._ranks.append(len(self._inside))
            score = self._score(inside)
            best = self._best[-1] if self._best else math.nan
            self._scores.append(score)
            self._best.append(best if math.isnan(score) or best >= score else score)

    def cut(self, length: int) -> None:
        """Keep the first rows only."""
        for kept in (self._ranks, self._scores, self._best):
            del kept[length:]
        del self._inside[self._ranks[-1] if self._ranks else 0 :]

    def scores(self, start: int = 0) -> NDArray[np.float64]:
        """As `running_scores`, from a row on."""
        return np.array(self._scores[start:], np.float64)

    @property
    def highest(self) -> float | None:
        """The largest running score; None if no row has any."""
        best = self._best[-1] if self._best else math.nan
        return None if math.isnan(best) else best

    def is_inside(self, row: int, counts: bool) -> bool:
        """Whether a row is in scope; `counts`: it is of the reading's kind."""
        in_prompt = row <= self.end
        return (
            counts
            and row >= self.window.skip
            and (self.window.scope == "both" or in_prompt == (self.window.scope == "prompt"))
        )

    def _score(self, inside: bool) -> float:
        """The running score at the row that comes next, whose logit is kept if it is in scope."""
        at_end = len(self) == self.end and self.window.scope != "answer"
        values = self._inside[-self.window.size :]
        short = len(values) < self.window.least
        if not values or (not at_end if short else not inside):
            return math.nan
        total = 0.0
        for value in values:
            total += value
        return total / len(values)
