"""Token readings of one prompt, whose rows come in as many passes as the server wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerbridge_tgi.rows import Part
from steerbridge_torch import RowScores


class PromptRows:
    """Running scores of one request by probe."""

    def __init__(self) -> None:
        self._scores: dict[int, RowScores] = {}

    def add(
        self,
        index: int,
        probe: Any,
        part: Part,
        logits_N: Tensor,
        sound_N: Tensor,
        images_N: Tensor | None,
    ) -> None:
        """The rows of a part of a pass.

        Args:
            logits_N: of all rows of the pass.
            images_N: which of them are an image's; None: none.
        """
        device, reading = logits_N.device, probe.token_reading
        if index not in self._scores:
            self._scores[index] = RowScores(probe, 1, device)
        own = slice(part.first, part.first + part.count)
        inside = torch.arange(part.position, part.position + part.count, device=device)
        inside = inside >= reading.skip
        if reading.rows != "all":
            none = torch.zeros(part.count, dtype=torch.bool, device=device)
            images = none if images_N is None else images_N[own].to(device)
            inside &= images if reading.rows == "image" else ~images
        at_end = torch.zeros(part.count, dtype=torch.bool, device=device)
        at_end[-1] = part.ends
        self._scores[index].add(
            part.position, logits_N[None, own], sound_N[None, own], inside[None], at_end[None]
        )

    def known(self, index: int) -> tuple[float, float, float]:
        """A probe's score (NaN: none), whether all rows are sound (1), and the row at which it
        fired."""
        fired, score, sound = self._scores[index].snapshot(0)
        return score, float(sound), float(fired)
