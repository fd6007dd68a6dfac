"""A probe that goes on reading in the answer of one request."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from steerbridge import reference
from steerbridge.reference import Verdict
from steerbridge.running import Rows
from steerbridge.spec import Probe


class Followed:
    """The rows of a sequence so far, and what follows from them.

    Args:
        logits, sound, counted: of the prompt's rows [P]: sound where states and outputs are finite,
            counted where they are of the reading's kind.
    """

    def __init__(
        self,
        probe: Probe,
        logits: NDArray[np.float32],
        sound: NDArray[np.bool_],
        counted: NDArray[np.bool_],
    ) -> None:
        assert probe.token_reading is not None
        self._probe, self._end = probe, len(logits) - 1
        over = reference.window(probe.token_reading)
        self._rows = Rows(over, logits, counted)
        self._unsound = np.flatnonzero(over.in_scope(counted, self._end) & ~sound).tolist()
        self._fired: int | None = None
        self._find(0)

    def add(
        self,
        start: int,
        logits: NDArray[np.float32],
        sound: NDArray[np.bool_],
        counted: NDArray[np.bool_],
    ) -> None:
        """Rows from position `start` on; those that were there before are taken back."""
        self.cut(start)
        for row, good in enumerate(sound.tolist(), start):
            if not good and self._rows.is_inside(row, bool(counted[row - start])):
                self._unsound.append(row)
        self._rows.add(logits, counted)
        self._find(start)

    def cut(self, length: int) -> None:
        """Keep the first rows only."""
        if length >= len(self._rows):
            return
        self._rows.cut(length)
        self._unsound = [row for row in self._unsound if row < length]
        if self._fired is not None and self._fired >= length:
            self._fired = None

    def _find(self, start: int) -> None:
        """Where it first fired, if that is among the rows from `start` on."""
        if self._fired is not None:
            return
        scores = self._rows.scores(start)
        crossed = ~np.isnan(scores)
        crossed &= reference.fires(self._probe, reference.running_score(scores))
        found = [*(start + np.flatnonzero(crossed)[:1]).tolist(), *self._unsound[:1]]
        self._fired = min(found) if found else None

    def verdict(self) -> Verdict:
        """What the probe says of the rows so far."""
        place: Literal["", "prompt", "answer"] = ""
        if self._fired is not None:
            place = "prompt" if self._fired <= self._end else "answer"
        highest = None if self._unsound else self._rows.highest
        return Verdict(
            self._probe.id,
            math.nan if highest is None else float(reference.running_score(highest)),
            self._probe.threshold,
            self._probe.comparator,
            self._fired is not None,
            reference.NOT_FINITE if self._unsound else "",
            place,
            self._fired,
        )
