"""Token readings of one batch: which of its rows are in scope, and what is known of them.

Shapes: B rows of the batch, P columns of the prompt, Q columns of one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerbridge import reference
from steerbridge.errors import RowMappingLost
from steerbridge.spec import SteeringSpec, TokenReading
from steerbridge_torch import NEVER, Judged, RowLogits, RowScores


@dataclass(slots=True)
class Layout:
    """Where the tokens of a batch are.

    Args:
        mask: [B, P] bool, on the CPU: tokens of the prompt.
        ends: [B] columns of the prompts' last tokens.
        images: [B, P] rows of images; None: not known.
    """

    mask: Tensor
    ends: Tensor
    images: Tensor | None
    numbers: Tensor = field(init=False)  # [B, P] of rows, from the first token on
    lengths: Tensor = field(init=False)  # [B]

    def __post_init__(self) -> None:
        self.numbers = self.mask.cumsum(dim=1) - 1
        self.lengths = self.mask.sum(dim=1)

    def number(self, columns_BQ: Tensor) -> Tensor:
        """Numbers [B, Q] of rows in their sequence."""
        prompt = self.mask.shape[1]
        inside = self.numbers.gather(1, columns_BQ.clamp(max=prompt - 1))
        behind = self.lengths[:, None] + columns_BQ - prompt
        return torch.where(columns_BQ < prompt, inside, behind)

    def in_scope(self, reading: TokenReading, columns_Q: Tensor, live_BQ: Tensor) -> Tensor:
        """Which rows [B, Q] a reading counts.

        Args:
            live_BQ: rows that are somebody's, behind the prompt.
        """
        prompt = self.mask.shape[1]
        if int(columns_Q[0]) >= prompt and reading.skip <= int(self.lengths.min()):
            # Rows of answers, one a pass most often.
            none = reading.scope == "prompt" or reading.rows == "image"
            return torch.zeros_like(live_BQ) if none else live_BQ
        columns = columns_Q.expand(len(self.mask), -1)
        within = columns < prompt
        at = columns.clamp(max=prompt - 1)
        counted = torch.where(within, self.mask.gather(1, at), live_BQ)
        if reading.rows != "all":
            assert self.images is not None
            images = within & self.images.gather(1, at)
            counted = counted & (images if reading.rows == "image" else ~images)
        if reading.skip:
            counted = counted & (self.number(columns) >= reading.skip)
        if reading.scope == "both":
            return counted
        in_prompt = columns <= self.ends[:, None]
        return counted & (in_prompt if reading.scope == "prompt" else ~in_prompt)


NO_IMAGE_ROWS = "which rows are an image's is not known: the prompt has no token ids"


class TokenRows:
    """What the token readings of a package know of a batch.

    Args:
        logits: of each probe with a token reading, by its index.
    """

    def __init__(self, spec: SteeringSpec, logits: Mapping[int, RowLogits]) -> None:
        self._spec, self._logits = spec, logits
        self._scores: dict[int, RowScores] = {}
        self._total: dict[int, tuple[Tensor, Tensor]] = {}  # of this pass

    @property
    def probes(self) -> tuple[int, ...]:
        """Indices of the probes."""
        return tuple(self._logits)

    @property
    def reads_answers(self) -> bool:
        """Whether rows behind the prompt's end are in some scope."""
        return any(self._reading(probe).scope != "prompt" for probe in self._logits)

    def _reading(self, probe: int) -> TokenReading:
        reading = self._spec.probes[probe].token_reading
        assert reading is not None
        return reading

    def check_cached(self, start: int) -> None:
        """Raise RowMappingLost if the logits of `start` cached tokens would be needed."""
        for probe in self._logits:
            if self._reading(probe).scope != "answer":
                raise RowMappingLost(
                    f"{self._spec.probes[probe].id}: {self._reading(probe)} needs every row of "
                    f"the prompt, but {start} come from a cache; generate without one"
                )

    def wanted(self, probe: int, start: int, stop: int, layout: Layout) -> bool:
        """Whether a pass over these columns may hold rows in scope."""
        scope = self._reading(probe).scope
        if scope == "prompt":
            return start < layout.mask.shape[1]
        return scope == "both" or stop - 1 > int(layout.ends.min())

    def take(self, probe: int, site: int, h_BQD: Tensor) -> None:
        """The states of all rows of the pass at one of the reading's sites."""
        h = h_BQD.detach() if h_BQD.requires_grad else h_BQD
        part, sound = self._logits[probe].part(site, h)
        if probe in self._total:
            total, before = self._total[probe]
            part = total.to(part.device) + part
            sound = before.to(sound.device) & sound
        self._total[probe] = part, sound

    def close(self, probe: int, start: int, inside_BQ: Tensor, ends_BQ: Tensor) -> None:
        """All sites of the reading were taken: what follows for the columns of the pass."""
        total, sound = self._total.pop(probe)
        logits, finite = self._logits[probe].logits(total)
        device = logits.device
        if probe not in self._scores:
            self._scores[probe] = RowScores(self._spec.probes[probe], len(logits), device)
        if self._reading(probe).scope == "answer":
            ends_BQ = torch.zeros_like(ends_BQ)
        self._scores[probe].add(
            start, logits, sound & finite, inside_BQ.to(device), ends_BQ.to(device)
        )

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        for scores in self._scores.values():
            scores.reorder(rows)

    def fired(self, probe: int, layout: Layout) -> Tensor:
        """The column [B] at which a probe fired, on the CPU; `NEVER`."""
        if layout.images is None and self._reading(probe).rows != "all":
            return layout.ends
        scores = self._scores.get(probe)
        return torch.full_like(layout.ends, NEVER) if scores is None else scores.fired()

    def judged(self, probe: int, layout: Layout, until_B: Tensor) -> Judged:
        """What a probe says of the rows in front of the columns `until_B` [B]."""
        fired, nan = self.fired(probe, layout), torch.full((len(layout.ends),), torch.nan)
        if layout.images is None and self._reading(probe).rows != "all":
            return Judged(nan, fired, (NO_IMAGE_ROWS,) * len(nan), self._rows(layout, fired))
        scores = self._scores.get(probe)
        if scores is None:  # none of its rows has come
            return Judged(nan, fired, ("",) * len(nan), fired)
        fired = torch.where(fired < until_B, fired, NEVER)
        sound = scores.sound_at(until_B - 1).tolist()
        reasons = tuple("" if good else reference.NOT_FINITE for good in sound)
        return Judged(scores.scores_at(until_B - 1), fired, reasons, self._rows(layout, fired))

    def _rows(self, layout: Layout, columns_B: Tensor) -> Tensor:
        known = columns_B.clamp(max=1 << 30)
        return layout.number(known[:, None])[:, 0]

    def scores_at(self, probe: int, columns_B: Tensor) -> Tensor:
        """Scores [B] behind these columns; NaN where there is none."""
        if probe not in self._scores:
            return torch.full((len(columns_B),), torch.nan)
        return self._scores[probe].scores_at(columns_B)
