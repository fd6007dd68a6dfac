"""Requests that TGI's router asks for in parts.

After 1,024 tokens (`DEFAULT_GENERATION_LENGTH`) it sends the text of the prompt and of the answer
so far as a new request (`generate_stream` in router/src/infer/mod.rs). That is one request: judged
in the middle of its answer, what had fired would be lost. Text is what the router joins, so text is
what is compared; its tokens may be others than those that were generated.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from steerbridge.runtime import Outcome

REMEMBERED: Final = 10_000  # requests that ended for length


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided of a prompt of so many tokens; `strengths` as in `State`. `tokens` counts
    those of the answer too."""

    prompt: int
    tokens: int
    outcome: Outcome
    strengths: dict[int, float]


def text_of(request: Any) -> bytes:
    """What a request of the router asks: its texts, and the bytes of its pictures."""
    parts = []
    for chunk in request.input_chunks.chunks:
        image = chunk.HasField("image")
        parts.append(b"\0" + hashlib.sha256(chunk.image.data).digest() if image else _text(chunk))
    return b"".join(parts)


def _text(chunk: Any) -> bytes:
    text: str = chunk.text
    return text.encode("utf-8", "surrogatepass")


class Continued:
    """The last requests that ended for length, by their text: the prompt's, then the answer's."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[int, Verdict]] = OrderedDict()
        self._sizes: Counter[int] = Counter()  # of the texts, in bytes

    def add(self, text: bytes, verdict: Verdict) -> None:
        """A request ended for length."""
        key = hashlib.sha256(text).digest()
        self._forget(key)
        self._known[key] = len(text), verdict
        self._sizes[len(text)] += 1
        if len(self._known) > REMEMBERED:
            self._forget(next(iter(self._known)))

    def find(self, text: bytes, tokens: int) -> Verdict | None:
        """The verdict that a prompt of so many tokens must have: that of a request that fired, if
        the text begins with it; of one that did not fire, if it is the very text and as many
        tokens, so that nothing can be appended, and nothing be cut off by `truncate`."""
        running, done = hashlib.sha256(), 0
        found = None
        for size in sorted(size for size in self._sizes if size <= len(text)):
            running.update(text[done:size])
            done = size
            _, verdict = self._known.get(running.digest(), (0, None))
            if verdict is None:
                continue
            if verdict.outcome.rules or (size == len(text) and verdict.tokens == tokens):
                found = verdict
        return found

    def _forget(self, key: bytes) -> None:
        if (known := self._known.pop(key, None)) is not None:
            self._sizes[known[0]] -= 1
            if not self._sizes[known[0]]:
                del self._sizes[known[0]]
