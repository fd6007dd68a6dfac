"""Which rows of a forward pass belong to which request of a batch of TGI.

Both layouts are computed from Python lists only, so nothing waits for a device. `CausalLM` pads on
the left: row s of request i is i * S + s. The flash classes concatenate rows; a pass may hold
answers, whole prompts, parts of prompts and drafts to verify.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

HEALTH: Final = 2**64 - 1  # the request id of the router's own check


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one request in one pass.

    `first` and `count` are a range of the pass's rows; `position` is that of the first row in its
    sequence.
    `prompt` is the prompt's length in tokens, None for rows of an answer. `head` are the rows
    whose logits are sampled from, among those that reach the output embedding. `source` is the
    request as the router sent it.
    """

    request: int
    first: int
    count: int
    position: int
    prompt: int | None
    head: range
    source: Any

    @property
    def ends(self) -> bool:
        """True if the prompt's last token is here."""
        return self.prompt is not None and self.position + self.count == self.prompt

    @property
    def goes_on(self) -> bool:
        """True if the prompt has more rows in a later pass: the logits are not used."""
        return self.prompt is not None and not self.ends


def padded(batch: Any) -> list[Part]:
    """Rows of a `CausalLMBatch` at the call of `generate_token`."""
    rows = batch.input_ids.shape[1]
    parts = []
    for i, request in enumerate(batch.requests):
        last = (i + 1) * rows - 1
        count = batch.input_lengths[i] if batch.past_key_values is None else 1
        prompt = count if batch.past_key_values is None else None
        head = range(last, last + 1)
        position = batch.input_lengths[i] - count
        parts.append(Part(request.id, last + 1 - count, count, position, prompt, head, request))
    return parts


def flattened(batch: Any) -> list[Part]:
    """Rows of a `FlashCausalLMBatch` at the call of `forward`."""
    evaluates = batch.cu_seqlen_prefill is not None  # prompts, and answers among them
    drafts = 1 if batch.speculative_ids is None else 1 + batch.speculative_ids.shape[1]
    parts: list[Part] = []
    first = 0
    for i, request in enumerate(batch.requests):
        count = batch.input_lengths[i] if evaluates else drafts
        prompt = batch.prompt_lengths[i] if evaluates and batch.prefilling_mask[i] else None
        if evaluates:
            last = batch.prefill_cu_outlens[i + 1]
            head = range(last - 1, last)
        else:
            head = range(first, first + count)
        parts.append(Part(request.id, first, count, batch.cache_lengths[i], prompt, head, request))
        first += count
    return parts
