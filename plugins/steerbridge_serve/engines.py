"""A steered model that answers one request at a time, token by token: llama.cpp or transformers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Attachment, Outcome
from steerbridge.stats import log_probability


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a message: text, or the bytes of an image file."""

    text: str = ""
    image: bytes | None = None


@dataclass(frozen=True, slots=True)
class Message:
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


Emit = Callable[[Token, Outcome | None], bool]  # returns False to stop


class Engine(Protocol):
    """One request at a time, always on the same thread."""

    name: str
    context: int  # tokens of prompt and answer together
    vision: bool
    package: SteeringPackage  # with the thresholds for this runtime

    def answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        """Emit tokens until the answer ends, each with the outcome once it is known.

        Raises:
            DataError: a prompt that does not fit, an image that cannot be read.
            UnsupportedFeature: images for a model without a vision tower.
            SteeringFailed: the answer would not have been guarded.
        """
        ...


def open_engine(
    runtime: str,
    model: str,
    package: SteeringPackage,
    *,
    mmproj: str,
    context: int,
    ignore: Sequence[str],
) -> Engine:
    """Open a model in a runtime and attach the package.

    Raises: what the adapters raise for the model or the package.
    """
    if runtime == "llama.cpp":
        return _LlamaCpp(model, package, mmproj, context, ignore)
    if runtime == "hf":
        return _Transformers(model, package, context, ignore)
    raise UnsupportedFeature(runtime, "serve", "llama.cpp or hf")


def _check_room(tokens: int, sampling: Sampling, context: int) -> None:
    if sampling.max_new_tokens >= context:
        raise DataError(
            Problem("max_new_tokens", f"{context - 1} at most", str(sampling.max_new_tokens))
        )
    if tokens + sampling.max_new_tokens > context:
        want = f"{context - sampling.max_new_tokens} tokens at most, for the answer asked for"
        raise DataError(Problem("inputs", want, str(tokens)))


@contextlib.contextmanager
def _attached(session: Attachment, steered: bool) -> Iterator[None]:
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


class _LlamaCpp:
    def __init__(
        self, model: str, package: SteeringPackage, mmproj: str, context: int, ignore: Sequence[str]
    ) -> None:
        from steerbridge_llama_cpp import open_model, steer

        options = {"mmproj": mmproj} if mmproj else {}
        self._model = open_model(model, n_ctx=context, **options)
        self._llama: Any = self._model.llama
        self._session = steer(self._llama, package, ignore=ignore)
        self.package = self._session.package
        self.name = self._model.facts.name or model
        self.context = int(self._llama.n_ctx())
        self.vision = bool(mmproj)

    def answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        try:
            with _attached(self._session, question.steered):
                return self._answer(question, sampling, emit)
        except Exception:
            self._llama.reset()  # recovers a failed session
            raise

    def _answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        tokens = self._model.evaluated_chat(
            _chat_messages(question), question.images, question.prompt
        )
        _check_room(len(tokens), sampling, self.context)
        if sampling.seed is not None:
            self._llama.set_seed(sampling.seed)
        chosen = self._llama.generate(
            tokens,
            temp=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=0.0,
            repeat_penalty=sampling.repetition_penalty,
        )
        finish = "length"
        with contextlib.closing(chosen):
            for count, id in enumerate(chosen, 1):
                if self._model.ends_turn(id):
                    finish = "eos_token"
                logprob = None
                if sampling.logprobs:
                    logprob = self._model.log_probability(id)
                token = Token(id, self._model.piece(id), finish == "eos_token", logprob)
                outcome = self._session.current if question.steered else None
                if not emit(token, outcome):
                    finish = "stopped"
                if finish != "length" or count == sampling.max_new_tokens:
                    break
        return Ended(finish, len(tokens), outcome)


class _Transformers:
    def __init__(
        self, model: str, package: SteeringPackage, context: int, ignore: Sequence[str]
    ) -> None:
        from steerbridge_hf import open_model, steer

        self._model = open_model(model)
        tokenizer = self._model.tokenizer
        self._session = steer(self._model.model, package, tokenizer=tokenizer, ignore=ignore)
        self.package = self._session.package
        self.name = self._model.facts.name or model
        longest = self._model.model.config.get_text_config().max_position_embeddings
        self.context = min(context, longest) if context else longest
        self.vision = self._model.processor is not None

    def answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        with _attached(self._session, question.steered):
            return self._answer(question, sampling, emit)

    def _answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        from transformers import LogitsProcessorList, StoppingCriteriaList, set_seed

        inputs = self._inputs(question)
        length = int(inputs["input_ids"].shape[1])
        _check_room(length, sampling, self.context)
        if sampling.seed is not None:
            set_seed(sampling.seed)
        session = self._session if question.steered else None
        stream = _Stream(self._model, session, emit, sampling.logprobs)
        warm = sampling.temperature > 0
        options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        self._model.model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=warm,
            **(options if warm else {}),
            repetition_penalty=sampling.repetition_penalty,
            pad_token_id=self._model.tokenizer.pad_token_id,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([stream.stops]),
            logits_processor=LogitsProcessorList([stream.keep]),
        )
        return Ended(stream.finish, length, self._session.outcomes[0] if session else None)

    def _inputs(self, question: Question) -> Any:
        model, messages = self._model, _chat_messages(question)
        pictures = [_picture(image) for image in question.images]
        if pictures and model.processor is None:
            raise UnsupportedFeature("hf", "images: this model has no processor")
        render = model.processor if pictures else model.tokenizer
        text = question.prompt
        if messages:
            text = render.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        arguments: dict[str, Any] = {"add_special_tokens": not messages, "return_tensors": "pt"}
        if pictures:
            return model.processor(text=[text], images=[pictures], **arguments)
        return model.tokenizer(text, **arguments)


class _Stream:
    """A streamer for `generate` that emits tokens, and stops it when `emit` returns False."""

    def __init__(self, model: Any, session: Any, emit: Emit, logprobs: bool) -> None:
        self._model, self._session, self._emit = model, session, emit
        self._ends = model.stop_tokens()
        self._logits: Any = None
        self._logprobs = logprobs
        self._prompt = True  # the first value is the prompt
        self._ids: list[int] = []
        self._emitted = 0  # characters
        self.finish = "length"

    def keep(self, ids: Any, scores: Any) -> Any:  # noqa: ARG002 - as transformers calls it
        if self._logprobs:
            self._logits = scores[0].float().cpu().numpy()
        return scores

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        id = int(value.reshape(-1)[0])
        ends = id in self._ends
        logprob = None if self._logits is None else log_probability(self._logits, id)
        token = Token(id, self._written(id).encode(), ends, logprob)
        if not self._emit(token, self._session and self._session.current):
            self.finish = "stopped"
        elif ends:
            self.finish = "eos_token"

    def _written(self, id: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        self._ids.append(id)
        text = self._model.tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        added, self._emitted = text[self._emitted :], len(text)
        return str(added)

    def end(self) -> None:
        """See transformers' streamers."""

    def stops(self, ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002
        import torch

        done = self.finish == "stopped"
        return torch.full((ids.shape[0],), done, device=ids.device, dtype=torch.bool)


def _chat_messages(question: Question) -> list[dict[str, Any]]:
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


def _picture(image: bytes) -> Image.Image:
    with Image.open(io.BytesIO(image)) as opened:
        return opened.convert("RGB")
