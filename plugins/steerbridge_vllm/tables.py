"""What is kept of every row whose keys and values are cached, by its place in the KV cache.

A prompt may begin with blocks that another request has computed, and a preempted one goes on from
its own. Logits of rows and sums of states are therefore kept where the keys are: by slot and by
block. Whoever has the blocks of a prompt has these too. What is not known is not a number, and
makes a probe unjudged.

Shapes: M rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerbridge_torch import wide


class Mean(NamedTuple):
    """What is summed: states at a depth, of all rows or of those of images."""

    depth: int
    images: bool


class Places(NamedTuple):
    """Where rows of a pass lie in the cache.

    Attributes:
        blocks: of each row [M].
        fresh: blocks that begin in these rows, or in others that are not summed.
    """

    blocks: Tensor
    fresh: Tensor


class Tables:
    """Logits by slot, and sums by block.

    Args:
        blocks: of the KV cache.
        size: rows of a block.
        width: D.
        probes: indices of those whose rows have logits.
    """

    def __init__(
        self,
        blocks: int,
        size: int,
        width: int,
        probes: Iterable[int],
        means: Iterable[Mean],
        device: torch.device,
    ) -> None:
        self.size, self._device = size, device
        unknown = float("nan")
        self._logits = {p: torch.full((blocks * size,), unknown, device=device) for p in probes}
        kind = wide(device)
        self._sums = {
            mean: torch.full((blocks, width), unknown, dtype=kind, device=device) for mean in means
        }

    def slots(self, blocks: NDArray[np.int32], start: int, stop: int) -> NDArray[np.int64]:
        """The slots of a sequence's rows from one position up to another."""
        at = np.arange(start, stop)
        return blocks[at // self.size].astype(np.int64) * self.size + at % self.size

    def tensor(self, numbers: NDArray[np.int64]) -> Tensor:
        """Numbers on the device."""
        return torch.from_numpy(numbers).to(self._device, non_blocking=True)

    def write(self, probe: int, slots_M: Tensor, logits_M: Tensor, sound_M: Tensor) -> None:
        """Logits of rows; those of unsound ones are not kept."""
        self._logits[probe][slots_M] = logits_M.masked_fill(~sound_M, float("nan"))

    def logits(self, probe: int, slots: NDArray[np.int64]) -> Tensor:
        """The logits [M] of the rows in these slots."""
        return self._logits[probe][self.tensor(slots)]

    def add(self, mean: Mean, places: Places, states_MD: Tensor) -> None:
        """Sum rows into their blocks; a block that begins with one of them begins at zero."""
        sums = self._sums[mean]
        sums[places.fresh] = 0
        sums.index_add_(0, places.blocks, states_MD.to(sums.dtype))

    def total(self, mean: Mean, blocks: NDArray[np.int32]) -> Tensor:
        """The sum [D] over whole blocks."""
        return self._sums[mean][self.tensor(blocks.astype(np.int64))].sum(dim=0)
