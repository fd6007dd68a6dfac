"""The interface between a server and a runtime: one steered model, one request at a time.

`steerbridge serve` speaks HTTP and knows no runtime. A runtime that can be served names an
`EngineOpener` in `steerbridge.registry.Runtime.engine`; the rest of this module is what the
engines of any runtime need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from steerbridge.data import Example
from steerbridge.errors import DataError, Problem, SteerbridgeError, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Attachment, Outcome

JSON_OBJECT: Final = '{"type": "object"}'
"""The schema of an answer that is any JSON object."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image: rows of red, green and blue bytes [height, width, 3]."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a message: text, or a picture."""

    text: str = ""
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; its role is `system`, `user` or `assistant`."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks: messages of a chat, or a prompt used verbatim.

    `prefill` is text with which the answer to a chat begins; it belongs to the prompt. `steered`
    is False for an answer without the package.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    prefill: str = ""
    steered: bool = True

    @property
    def pictures(self) -> list[Picture]:
        """The pictures of all messages, in order."""
        parts = (part for message in self.messages for part in message.parts)
        return [part.picture for part in parts if part.picture is not None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one.

    `max_new_tokens` is None for as many as the context holds, and 0 for a prompt that is only
    judged. `json_schema` is the text of a JSON Schema that the answer must follow. `top_logprobs`
    is the number of likeliest tokens told beside each chosen one.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: str | None = None
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the likeliest tokens at a place."""

    id: int
    text: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token. `text` may be part of a character; `logprob` is in nats."""

    id: int
    text: bytes
    special: bool = False
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """Why an answer ended (`eos_token`, `length`, `stopped`), and the prompt's tokens."""

    finish: str
    prompt_tokens: int
    outcome: Outcome | None  # None for an unsteered question


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model receives it: its text, and its tokens."""

    text: str
    tokens: tuple[Token, ...]


Emit = Callable[[Token, Outcome | None], bool]
"""Called with each token, and the outcome once it is known; returns False to stop."""

Check = Callable[[], None]
"""Called often while a prompt is evaluated; raises `Cancelled` if nobody waits any more."""


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

    def prompt(self, question: Question) -> Prompt:
        """The prompt of a question without pictures; nothing is evaluated.

        Raises:
            DataError: messages that the chat template does not take.
            UnsupportedFeature: pictures.
        """
        ...

    def answer(self, question: Question, sampling: Sampling, emit: Emit, check: Check) -> Ended:
        """Emit tokens until the answer ends, each with the outcome once it is known. With
        `max_new_tokens` 0 the prompt is judged, and nothing is emitted.

        Raises:
            DataError: a prompt that does not fit, messages that the chat template does not take.
            UnsupportedFeature: what the model cannot do, such as images or a way of sampling.
            SteeringFailed: the answer would not have been guarded.
            Cancelled: from `check`; the next question is answered as if this one had not been.
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


def room(tokens: int, sampling: Sampling, context: int) -> int:
    """How many tokens the answer to a prompt of `tokens` may have.

    Raises:
        DataError: prompt and answer do not fit the context.
    """
    new = sampling.max_new_tokens
    if new is not None and new >= context:
        raise DataError(Problem("max_new_tokens", f"{context - 1} at most", str(new)))
    if not tokens:
        raise DataError(Problem("inputs", "a prompt that has tokens", "none"))
    least = 1 if new is None else new
    if tokens + least > context:
        want = f"{context - least} tokens at most, for the answer asked for"
        raise DataError(Problem("inputs", want, str(tokens)))
    return context - tokens if new is None else new


def biases(sampling: Sampling, vocabulary: int) -> dict[int, float]:
    """The biases of logits by token id.

    Raises:
        DataError: a token that is not in the vocabulary.
    """
    for id in sampling.logit_bias:
        if not 0 <= id < vocabulary:
            want = f"token ids from 0 to {vocabulary - 1}"
            raise DataError(Problem("logit_bias", want, str(id)))
    return dict(sampling.logit_bias)


def check_sampling(runtime: str, sampling: Sampling, *unsupported: str) -> None:
    """Raise UnsupportedFeature if one of these fields of `Sampling` asks for something."""
    plain = Sampling()
    for name in unsupported:
        if getattr(sampling, name) != getattr(plain, name):
            raise UnsupportedFeature(runtime, f"{name} is not supported")


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
        images = any(part.picture is not None for part in message.parts)
        parts = [
            {"type": "image"} if part.picture is not None else {"type": "text", "text": part.text}
            for part in message.parts
        ]
        text = "".join(part.text for part in message.parts)
        messages.append({"role": message.role, "content": parts if images else text})
    return messages


@contextlib.contextmanager
def template_errors() -> Iterator[None]:
    """What a chat template raises becomes a DataError: it does not take these messages."""
    try:
        yield
    except SteerbridgeError:
        raise
    except Exception as error:  # of Jinja, or of what the template calls
        want = "what the chat template of this model takes"
        raise DataError(Problem("messages", want, str(error) or repr(error))) from error


def templated(templates: Any, prompt: Example, content: Any) -> str:
    """The text that the template of a Hugging Face tokenizer or processor makes of a prompt, and
    the answer's beginning.

    Args:
        content: of the prompt's last message.

    Raises:
        DataError: the template does not take these messages.
    """
    with template_errors():
        text: str = templates.apply_chat_template(
            prompt.messages(content), tokenize=False, add_generation_prompt=True
        )
    return text + prompt.prefill


def token_ids(tokenizer: Any, prompt: Example, runtime: str) -> list[int]:
    """Token ids of a prompt without images: the template with its generation prompt, if there is
    one.

    Raises:
        DataError: the template does not take these messages.
        UnsupportedFeature: a system message or earlier turns without a template.
    """
    if prompt.raw or tokenizer.chat_template is None:
        if prompt.is_chat:
            raise UnsupportedFeature(runtime, "a system message or turns without a template")
        return list(tokenizer(prompt.text + prompt.prefill)["input_ids"])
    text = templated(tokenizer, prompt, prompt.text)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def likeliest(
    logits: NDArray[Any], count: int, piece: Callable[[int], bytes]
) -> tuple[Alternative, ...]:
    """The `count` likeliest tokens of logits [V], in order; `piece` gives a token's text."""
    if not count:
        return ()
    values = np.asarray(logits, np.float64)
    total = np.logaddexp.reduce(values)
    ids = np.argpartition(-values, count - 1)[:count]
    ids = ids[np.argsort(-values[ids], kind="stable")].tolist()
    return tuple(Alternative(id, piece(id), float(values[id] - total)) for id in ids)
