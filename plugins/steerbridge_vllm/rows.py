"""Which rows of a pass belong to which request of a batch of vLLM.

Rows are told by the length of the prompt, not by the phase: an answer that was preempted is
evaluated again as if it were a prompt. All is read from arrays on the CPU, so nothing waits for a
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one request in one pass.

    Attributes:
        first, count: a range of the pass's rows.
        position: of the first of them in its sequence.
        prompt: the prompt's length.
        drafts: the last so many rows are tokens that were guessed; they may be taken back.
        blocks: numbers of the blocks of the KV cache that hold its sequence.
    """

    request: str
    first: int
    count: int
    position: int
    prompt: int
    drafts: int
    blocks: NDArray[np.int32]

    @property
    def stop(self) -> int:
        """The position behind its last row."""
        return self.position + self.count

    @property
    def certain(self) -> int:
        """The position behind its last row that is no guess."""
        return self.stop - self.drafts


def of_batch(runner: Any, scheduled: Any, counts: NDArray[np.int32], group: int) -> list[Part]:
    """The parts of a pass, in the order of the batch.

    Args:
        runner: of the first generation, between the preparation of its inputs and the pass.
        scheduled: the scheduler's output.
        counts: rows of each request.
        group: of the KV caches whose blocks number the rows.
    """
    batch = runner.input_batch
    table = batch.block_table.block_tables[group].block_table.np
    guesses = scheduled.scheduled_spec_decode_tokens
    parts, first = [], 0
    each = zip(
        batch.req_ids,
        counts.tolist(),
        batch.num_computed_tokens_cpu[: len(counts)].tolist(),
        batch.num_prompt_tokens[: len(counts)].tolist(),
        strict=True,
    )
    for i, (request, count, position, prompt) in enumerate(each):
        drafts = len(guesses.get(request, ()))
        parts.append(Part(request, first, count, position, prompt, drafts, table[i]))
        first += count
    return parts


def image_rows(features: Sequence[Any], prompt: int) -> NDArray[np.bool_]:
    """Which rows [P] of a prompt are an image's: those that get its embeddings."""
    rows = np.zeros(prompt, np.bool_)
    for feature in features:
        place = feature.mm_position
        inside = True if place.is_embed is None else place.is_embed.cpu().numpy()
        rows[place.offset : place.offset + place.length] = inside
    return rows
