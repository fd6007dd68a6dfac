"""From tokens to text: characters, and stop sequences."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from steerbridge.serving import Token


class Text:
    """The text of an answer, built token by token.

    Text that may begin a stop sequence is held back. With `includes`, the stop sequence that ended
    the answer is part of it (TGI), else it is not (OpenAI).
    """

    def __init__(self, stop: Sequence[str], includes: bool) -> None:
        self._stop, self._includes = [s for s in stop if s], includes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""
        self.whole = ""
        self.stopped = False

    def add(self, token: Token) -> str:
        """The text that can be sent after this token; empty after a stop sequence."""
        if self.stopped or token.special:
            return ""
        self._held += self._decode(token.text)
        at = [self._held.find(s) + len(s) * self._includes for s in self._stop if s in self._held]
        if at:
            self.stopped = True
            return self._release(min(at))
        longest = max((_overlap(self._held, s) for s in self._stop), default=0)
        return self._release(len(self._held) - longest)

    def end(self) -> str:
        """The text that was held back, unless a stop sequence ended the answer."""
        return "" if self.stopped else self._release(len(self._held)) + self._rest()

    def _rest(self) -> str:
        self._held = self._decode(b"", True)
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self.whole += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may begin a stop sequence."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
