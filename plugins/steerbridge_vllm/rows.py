"""Which rows of a pass belong to which request of a batch of vLLM.

Rows are told by the length of the prompt, not by the phase: an answer that was preempted is
evaluated again as if it were a prompt. All is read from arrays on the CPU, so nothing waits for a
device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def of_first(runner: Any, scheduled: Any, counts: NDArray[np.int32], group: int) -> list[Part]:
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


class Blocks:
    """The blocks of the KV caches that hold each request's rows, as the scheduler numbers them."""

    def __init__(self) -> None:
        self._of: dict[str, list[NDArray[np.int32]]] = {}  # by group of caches

    def take(self, scheduled: Any) -> None:
        """What the scheduler says before a pass."""
        self._drop(scheduled.finished_req_ids)
        self._drop(scheduled.preempted_req_ids or ())  # they come again as new ones
        for new in scheduled.scheduled_new_reqs:
            self._of[new.req_id] = [np.asarray(ids, np.int32) for ids in new.block_ids]
        known = scheduled.scheduled_cached_reqs
        for request, more in zip(known.req_ids, known.new_block_ids, strict=True):
            if more is not None:
                both = zip(self._of[request], more, strict=True)
                self._of[request] = [np.append(old, np.asarray(n, np.int32)) for old, n in both]

    def _drop(self, requests: Iterable[str]) -> None:
        for request in requests:
            self._of.pop(request, None)

    def of(self, request: str, group: int) -> NDArray[np.int32]:
        """The blocks of a request in a group."""
        return self._of[request][group]


def of_second(batch: Any, lengths: NDArray[np.int32], blocks: Blocks, group: int) -> list[Part]:
    """The same of a runner of the second generation.

    Args:
        batch: its prepared inputs.
        lengths: of prompts, by the runner's index of requests.
    """
    guesses = batch.num_draft_tokens_per_req
    parts, first = [], 0
    for i, request in enumerate(batch.req_ids):
        count, prompt = int(batch.num_scheduled_tokens[i]), int(lengths[batch.idx_mapping_np[i]])
        drafts = 0 if guesses is None else int(guesses[i])
        position = int(batch.num_computed_tokens_np[i])
        mine = blocks.of(request, group)
        parts.append(Part(request, first, count, position, prompt, drafts, mine))
        first += count
    return parts


def images_of(runner: Any, request: str, prompt: int) -> NDArray[np.bool_]:
    """Which rows [P] of a request's prompt are an image's."""
    if hasattr(runner, "requests"):
        return image_rows(runner.requests[request].mm_features, prompt)
    cache = runner.encoder_cache
    return image_rows(() if cache is None else cache.mm_features[request], prompt)


def image_rows(features: Sequence[Any], prompt: int) -> NDArray[np.bool_]:
    """Which rows [P] of a prompt are an image's: those that get its embeddings."""
    rows = np.zeros(prompt, np.bool_)
    for feature in features:
        place = feature.mm_position
        inside = True if place.is_embed is None else place.is_embed.cpu().numpy()
        rows[place.offset : place.offset + place.length] = inside
    return rows
