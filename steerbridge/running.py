"""Running scores over the rows of a sequence: what a token reading makes of its rows' logits.

Two forms that are equal bit for bit given the same logits: `running_scores` over whole arrays, and
`Rows`, to which rows come in any chunks and from which they may be taken back. Only the logits are
kept; all else follows from them. The meaning of each term is that of the format's page.

Shapes: T rows of one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class Rows:
    """The kept logits of one sequence, and the running scores that follow from them.

    `add` takes what a pass evaluated; `cut` takes rejected drafts back; `remove` closes a gap, as
    a shift of the context does: rows behind it keep the logits that they were computed with.
    """

    window: Window
    end: int | None = None
    _logits: list[float] = field(default_factory=list)
    _counted: list[bool] = field(default_factory=list)
    _scores: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._logits)

    def add(self, logits: Sequence[float], counted: Sequence[bool]) -> None:
        """Rows of the next pass, in order."""
        for logit, counts in zip(logits, counted, strict=True):
            self._logits.append(float(np.float32(logit)))
            self._counted.append(bool(counts))
            self._scores.append(self._score(len(self._logits) - 1))

    def end_prompt(self) -> None:
        """The last row is the prompt's end."""
        self.end = len(self) - 1
        self._derive()

    def cut(self, length: int) -> None:
        """Keep the first rows only; a prompt whose end is among the others is open again."""
        self._keep(slice(None, length))
        if self.end is not None and self.end >= length:
            self.end = None
            self._derive()

    def remove(self, start: int, stop: int) -> None:
        """Take rows out of the middle."""
        gone = range(*slice(start, stop).indices(len(self)))
        if self.end is not None:
            self.end = None if self.end in gone else self.end - sum(i < self.end for i in gone)
        for rows in (self._logits, self._counted, self._scores):
            del rows[start:stop]
        self._derive()

    def copy(self) -> Rows:
        """The same rows, for another sequence that begins with them."""
        kept = (list(self._logits), list(self._counted), list(self._scores))
        return Rows(self.window, self.end, *kept)

    @property
    def scores(self) -> NDArray[np.float64]:
        """As `running_scores`."""
        return np.array(self._scores, np.float64)

    @property
    def highest(self) -> tuple[float, int] | None:
        """The largest running score, and the first row that has it; None if no row has any."""
        known = [(score, -row) for row, score in enumerate(self._scores) if not math.isnan(score)]
        if not known:
            return None
        score, row = max(known)
        return score, -row

    def _keep(self, rows: slice) -> None:
        self._logits, self._counted = self._logits[rows], self._counted[rows]
        self._scores = self._scores[rows]

    def _derive(self) -> None:
        self._scores = [self._score(row) for row in range(len(self))]

    def _score(self, row: int) -> float:
        """The running score at a row, afresh from the logits."""
        at_end = row == self.end and self.window.scope != "answer"
        if not self._is_inside(row) and not at_end:
            return math.nan
        inside: list[float] = []
        for before in range(row, -1, -1):
            if self._is_inside(before):
                inside.append(self._logits[before])
            if len(inside) == self.window.size:
                break
        short = len(inside) < self.window.least
        if not inside or (short and not at_end) or not (short or self._is_inside(row)):
            return math.nan
        total = 0.0
        for logit in reversed(inside):
            total += logit
        return total / len(inside)

    def _is_inside(self, row: int) -> bool:
        if row < self.window.skip or not self._counted[row]:
            return False
        in_prompt = self.end is None or row <= self.end
        return self.window.scope == "both" or in_prompt == (self.window.scope == "prompt")
