"""What a client asks, whatever dialect it speaks; and the refused turns that are left out of it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from steerbridge.errors import DataError, Problem
from steerbridge.serving import Message, Part, Picture, Question, Sampling

BYTES_PER_TOKEN: Final = 32
"""Text longer than this for each token of the context is refused before it is tokenised, which may
take a time that grows with the square of a run of spaces."""
REFUSED_TURNS: Final = 10_000

Decode = Callable[[Sequence[bytes]], list[Picture]]


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a chat; its parts are texts and the bytes of picture files."""

    role: str
    parts: tuple[str | bytes, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


def begun(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], str]:
    """The turns of a chat, and the beginning of an answer with which it may end.

    Raises:
        DataError: that beginning has pictures.
    """
    *before, last = turns
    if last.role != "assistant":
        return turns, ""
    if any(isinstance(part, bytes) for part in last.parts):
        raise DataError(Problem("messages", "an answer that begins with text", "a picture in it"))
    return tuple(before), last.text


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: a chat, or a raw prompt.

    Attributes:
        prefill: text with which the answer begins, as the client wants it.
        count: answers to the one question.
        keeps_stop: a stop sequence is part of the answer that it ends, as in TGI.
        dropped: refused turns that were left out of `turns`.
    """

    sampling: Sampling
    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    prefill: str = ""
    stops: tuple[str, ...] = ()
    keeps_stop: bool = False
    count: int = 1
    steered: bool = True
    dropped: int = 0

    @property
    def form(self) -> str:
        """The name of the prompt's form, as in `evidence.forms`."""
        if not self.turns:
            return "raw"
        if self.prefill:
            return "prefill"
        roles = [turn.role for turn in self.turns]
        if "assistant" in roles or roles.count("user") > 1:
            return "turns"
        return "system" if "system" in roles else "chat"

    @property
    def answered(self) -> bool:
        """False if the prompt is only judged."""
        return self.sampling.max_new_tokens != 0

    @property
    def pictures(self) -> list[bytes]:
        """The picture files of all messages, in order."""
        parts = (part for turn in self.turns for part in turn.parts)
        return [part for part in parts if isinstance(part, bytes)]

    def check(self, context: int, max_pictures: int) -> None:
        """Raise DataError for what cannot fit, before it is rendered, decoded or tokenised."""
        if not self.turns and not self.prompt:
            raise DataError(Problem("messages", "one to answer", "none but the answer's beginning"))
        if len(self.turns) > context:
            raise DataError(Problem("messages", f"{context} at most", str(len(self.turns))))
        if len(self.pictures) > max_pictures:
            want = f"{max_pictures} pictures at most"
            raise DataError(Problem("messages", want, str(len(self.pictures))))
        texts = (self.prompt, self.prefill, *(turn.text for turn in self.turns))
        size, most = sum(len(text.encode()) for text in texts), BYTES_PER_TOKEN * context
        if size > most:
            want = f"text of {most} bytes at most ({BYTES_PER_TOKEN} for each token of the context)"
            raise DataError(Problem("messages" if self.turns else "inputs", want, str(size)))

    def question(self, decode: Decode) -> Question:
        """The question, its pictures decoded.

        Raises:
            DataError: a picture that cannot be used.
        """
        files = self.pictures
        pictures = iter(decode(files) if files else ())
        messages = tuple(
            Message(
                turn.role,
                tuple(
                    Part(text=part) if isinstance(part, str) else Part(picture=next(pictures))
                    for part in turn.parts
                ),
            )
            for turn in self.turns
        )
        return Question(messages, self.prompt, self.prefill, self.steered)


@dataclass(slots=True)
class RefusedTurns:
    """The turns that rules fired on, by the digest of the whole conversation up to the answer.

    A client sends them again with its next turn. They are left out then: what was refused once
    would fire again, whatever is asked now.
    """

    _known: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def add(self, turns: Sequence[Turn], answer: str) -> None:
        """Remember that this answer to a chat was steered."""
        *_, digest = _digests([*turns, Turn("assistant", (answer,))])
        self._known[digest] = None
        self._known.move_to_end(digest)
        if len(self._known) > REFUSED_TURNS:
            self._known.popitem(last=False)

    def without(self, turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], int]:
        """The turns without refused ones, and how many of these there were."""
        kept: list[Turn] = []
        dropped = 0
        for turn, digest in zip(turns, _digests(turns), strict=True):
            if turn.role == "assistant" and digest in self._known:
                dropped += 1
                while kept and kept[-1].role == "user":
                    kept.pop()
            else:
                kept.append(turn)
        return tuple(kept), dropped


def _digests(turns: Sequence[Turn]) -> Iterator[bytes]:
    """For each turn, the digest of the conversation up to it. Clients may trim an answer."""
    digest = b""
    for turn in turns:
        sha = hashlib.sha256(digest + turn.role.encode())
        parts = (turn.text.strip(),) if turn.role == "assistant" else turn.parts
        for part in parts:
            content = part.encode() if isinstance(part, str) else part
            sha.update(b"%d:%d:" % (isinstance(part, str), len(content)) + content)
        digest = sha.digest()
        yield digest
