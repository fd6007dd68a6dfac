"""From tokens to text and response bodies: characters, stop sequences, the two dialects."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from steerbridge.runtime import Outcome
from steerbridge.serving import Ended, Token


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


def steering(outcome: Outcome | None) -> dict[str, Any] | None:
    return None if outcome is None else outcome.to_json()


# ---------------------------------------------------------------- TGI


def tgi_finish(ended: Ended, text: Text) -> str:
    return "stop_sequence" if text.stopped else ended.finish.replace("stopped", "stop_sequence")


def tgi_token(token: Token, text: str) -> dict[str, Any]:
    # JSON has neither NaN nor infinity; a model whose states overflow gives them.
    known = token.logprob is not None and math.isfinite(token.logprob)
    logprob = token.logprob if known else None
    return {"id": token.id, "text": text, "logprob": logprob, "special": token.special}


def tgi_details(ended: Ended, text: Text, count: int, seed: int | None) -> dict[str, Any]:
    return {
        "finish_reason": tgi_finish(ended, text),
        "generated_tokens": count,
        "seed": seed,
        "input_length": ended.prompt_tokens,
    }


# ---------------------------------------------------------------- OpenAI


class Chat:
    """The answers of one chat request, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": "steerbridge",
        }

    def chunk(
        self, delta: dict[str, Any], outcome: Outcome | None, finish: str | None = None
    ) -> dict[str, Any]:
        # The client `text-generation` requires each of these fields.
        whole = {"role": "assistant", "content": None, "tool_calls": None, **delta}
        choice = {"index": 0, "delta": whole, "finish_reason": finish, "logprobs": None}
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [choice],
            "steering": steering(outcome),
        }

    def usage(self, ended: Ended, count: int) -> dict[str, Any]:
        """The last chunk, without choices, sent if the client asked for it."""
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": _usage(ended, count),
            "steering": steering(ended.outcome),
        }

    def whole(self, text: str, ended: Ended, count: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "finish_reason": chat_finish(ended),
                    "logprobs": None,
                }
            ],
            "usage": _usage(ended, count),
            "steering": steering(ended.outcome),
        }


def chat_finish(ended: Ended) -> str:
    return "length" if ended.finish == "length" else "stop"


def _usage(ended: Ended, count: int) -> dict[str, int]:
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": count,
        "total_tokens": ended.prompt_tokens + count,
    }
