"""The interface between a server and a runtime: one steered model, one request at a time.

`steerbridge serve` speaks HTTP and knows no runtime. A runtime that can be served names an
`EngineOpener` in `steerbridge.registry.Runtime.engine`; the rest of this module is what the
engines of any runtime need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from steerbridge.errors import DataError, Problem
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Attachment, Outcome


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a message: text, or the bytes of an image file."""

    text: str = ""
    image: bytes | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; its role is `system`, `user` or `assistant`."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks: messages of a chat, or a prompt used verbatim.

    `steered` is False for an answer without the package.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    steered: bool = True

    @property
    def images(self) -> list[bytes]:
        """The images of all messages, in order."""
        parts = (part for message in self.messages for part in message.parts)
        return [part.image for part in parts if part.image is not None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. `text` may be part of a character."""

    id: int
    text: bytes
    special: bool = False
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """Why an answer ended (`eos_token`, `length`, `stopped`), and the prompt's tokens."""

    finish: str
    prompt_tokens: int
    outcome: Outcome | None  # None for an unsteered question


Emit = Callable[[Token, Outcome | None], bool]
"""Called with each token, and the outcome once it is known; returns False to stop."""


@runtime_checkable
class Engine(Protocol):
    """A model with a package attached. It answers one request at a time, on one thread."""

    name: str
    """Name of the model, for clients."""
    context: int
    """Tokens of prompt and answer together."""
    vision: bool
    """Whether prompts may have images."""
    package: SteeringPackage
    """With the thresholds calibrated for this runtime and quantisation."""

    def answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        """Emit tokens until the answer ends, each with the outcome once it is known.

        Raises:
            DataError: a prompt that does not fit, an image that cannot be read.
            UnsupportedFeature: what the model cannot do, such as images or a way of sampling.
            SteeringFailed: the answer would not have been guarded.
        """
        ...


class EngineOpener(Protocol):
    """What `steerbridge.registry.Runtime.engine` names."""

    def __call__(
        self,
        model: str | Path,
        package: SteeringPackage,
        *,
        context: int,
        ignore: Sequence[str] = (),
        **options: Any,
    ) -> Engine:
        """Open a model and attach the package.

        Args:
            context: tokens of prompt and answer together, at most.
            ignore: fields of the package's base model that may differ.
            options: what the runtime's own `open_model` takes.

        Raises:
            ModelMismatch: the package was made for another model.
            UnsupportedFeature: an option or a part of the package that the runtime cannot use.
        """
        ...


def check_room(tokens: int, sampling: Sampling, context: int) -> None:
    """Raise DataError if a prompt of `tokens` and its answer do not fit the context."""
    if sampling.max_new_tokens >= context:
        raise DataError(
            Problem("max_new_tokens", f"{context - 1} at most", str(sampling.max_new_tokens))
        )
    if tokens + sampling.max_new_tokens > context:
        want = f"{context - sampling.max_new_tokens} tokens at most, for the answer asked for"
        raise DataError(Problem("inputs", want, str(tokens)))


@contextlib.contextmanager
def attached(session: Attachment, steered: bool) -> Iterator[None]:
    """Attach the package for a steered question; detach it for an unsteered one.

    `apply` is called before every steered question, at no cost if the package is attached, so a
    failure in an earlier answer cannot leave a later one unsteered.
    """
    if steered:
        session.apply()
        yield
        return
    session.remove()
    try:
        yield
    finally:
        session.apply()


def chat_messages(question: Question) -> list[dict[str, Any]]:
    """Messages in the form of chat templates: text, or parts if there are images."""
    messages = []
    for message in question.messages:
        images = any(part.image is not None for part in message.parts)
        parts = [
            {"type": "image"} if part.image is not None else {"type": "text", "text": part.text}
            for part in message.parts
        ]
        text = "".join(part.text for part in message.parts)
        messages.append({"role": message.role, "content": parts if images else text})
    return messages
