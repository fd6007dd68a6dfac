"""The `hf` runtime behind a server (see `steerbridge.serving`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList, set_seed

from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.serving import (
    Emit,
    Ended,
    Engine,
    Question,
    Sampling,
    Token,
    attached,
    chat_messages,
    check_room,
)
from steerbridge.stats import log_probability
from steerbridge_hf.adapter import Session, steer
from steerbridge_hf.model import HfModel, open_model
from steerbridge_hf.sites import RUNTIME


def open_engine(
    model: str | Path,
    package: SteeringPackage,
    *,
    context: int,
    ignore: Sequence[str] = (),
    **options: Any,
) -> Engine:
    """Open a model and attach the package; see `EngineOpener` and `open_model`.

    Args:
        context: 0: as long as the model's position embeddings reach.
    """
    opened = open_model(model, **options)
    return HfEngine(opened, package, opened.facts.name or str(model), context, ignore)


class HfEngine:
    """Answers from one transformers model."""

    def __init__(
        self,
        model: HfModel,
        package: SteeringPackage,
        name: str,
        context: int,
        ignore: Sequence[str],
    ) -> None:
        self._model = model
        self._session = steer(model.model, package, tokenizer=model.tokenizer, ignore=ignore)
        self.package = self._session.package
        self.name = name
        longest = model.model.config.get_text_config().max_position_embeddings
        self.context = min(context, longest) if context else longest
        self.vision = model.processor is not None

    def answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        """See `Engine`."""
        with attached(self._session, question.steered):
            return self._answer(question, sampling, emit)

    def _answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        inputs = self._inputs(question)
        length = int(inputs["input_ids"].shape[1])
        check_room(length, sampling, self.context)
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
        return Ended(stream.finish, length, session.outcomes[0] if session else None)

    def _inputs(self, question: Question) -> Any:
        model, messages = self._model, chat_messages(question)
        pictures = [_picture(image) for image in question.images]
        if pictures and model.processor is None:
            raise UnsupportedFeature(RUNTIME, "images: this model has no processor")
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

    def __init__(self, model: HfModel, session: Session | None, emit: Emit, logprobs: bool) -> None:
        self._model, self._session, self._emit = model, session, emit
        self._ends = model.stop_tokens()
        self._logits: Any = None
        self._logprobs = logprobs
        self._prompt = True  # the first value is the prompt
        self._ids: list[int] = []
        self._emitted = 0  # characters
        self.finish = "length"

    def keep(self, ids: Any, scores: Any) -> Any:
        """A logits processor: keeps the logits of the next token if they are asked for."""
        if self._logprobs:
            self._logits = scores[0].float().cpu().numpy()
        return scores

    def put(self, value: Any) -> None:
        """See transformers' streamers."""
        if self._prompt:
            self._prompt = False
            return
        id = int(value.reshape(-1)[0])
        ends = id in self._ends
        logprob = None if self._logits is None else log_probability(self._logits, id)
        token = Token(id, self._written(id).encode(), ends, logprob)
        outcome = None if self._session is None else self._session.current
        if not self._emit(token, outcome):
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

    def stops(self, ids: Any, scores: Any, **_: Any) -> Any:
        """A stopping criterion: whether `emit` returned False."""
        done = self.finish == "stopped"
        return torch.full((ids.shape[0],), done, device=ids.device, dtype=torch.bool)


def _picture(image: bytes) -> Image.Image:
    with Image.open(io.BytesIO(image)) as opened:
        return opened.convert("RGB")
