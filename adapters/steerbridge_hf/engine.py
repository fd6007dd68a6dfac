"""The `hf` runtime behind a server (see `steerbridge.serving`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList, set_seed

from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.serving import (
    Check,
    Emit,
    Ended,
    Engine,
    Picture,
    Prompt,
    Question,
    Sampling,
    Token,
    attached,
    biases,
    chat_messages,
    check_sampling,
    likeliest,
    room,
    template_errors,
)
from steerbridge.stats import log_probability
from steerbridge_hf.adapter import Session, steer
from steerbridge_hf.model import HfModel, open_model
from steerbridge_hf.sites import RUNTIME, locate


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
        self._vocabulary = int(model.model.config.get_text_config().vocab_size)

        self._check: Check = lambda: None
        for block in locate(model.model).blocks:  # a prompt is one pass
            block.register_forward_pre_hook(lambda *_: self._check())

    def prompt(self, question: Question) -> Prompt:
        """See `Engine`."""
        if question.pictures:
            raise UnsupportedFeature(RUNTIME, "tokens of a prompt with pictures")
        tokenizer = self._model.tokenizer
        text = self._written(question)
        ids = tokenizer(text, add_special_tokens=not question.messages)["input_ids"]
        tokens = tuple(Token(id, tokenizer.decode([id]).encode()) for id in ids)
        return Prompt(text, tokens)

    def answer(self, question: Question, sampling: Sampling, emit: Emit, check: Check) -> Ended:
        """See `Engine`."""
        self._check = check
        with attached(self._session, question.steered):
            return self._answer(question, sampling, emit)

    def _answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        check_sampling(RUNTIME, sampling, "frequency_penalty", "presence_penalty", "json_schema")
        inputs = self._inputs(question)
        length = int(inputs["input_ids"].shape[1])
        limit = room(length, sampling, self.context)
        if sampling.seed is None:
            torch.seed()  # an earlier request's seed would be continued
        else:
            set_seed(sampling.seed)
        session = self._session if question.steered else None
        stream = _Stream(self._model, session, emit if limit else _nothing, sampling)
        self._model.model.generate(
            **inputs,
            **_options(sampling, self._vocabulary),
            max_new_tokens=max(limit, 1),
            pad_token_id=self._model.tokenizer.pad_token_id,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([stream.stops]),
            logits_processor=LogitsProcessorList([stream.keep]),
        )
        outcome = session.outcomes[0] if session else None
        return Ended(stream.finish if limit else "length", length, outcome)

    def _written(self, question: Question) -> str:
        if not question.messages:
            return question.prompt
        render = self._model.processor if question.pictures else self._model.tokenizer
        with template_errors():
            text = render.apply_chat_template(
                chat_messages(question), tokenize=False, add_generation_prompt=True
            )
        return str(text) + question.prefill

    def _inputs(self, question: Question) -> Any:
        model = self._model
        pictures = [_image(picture) for picture in question.pictures]
        if pictures and model.processor is None:
            raise UnsupportedFeature(RUNTIME, "images: this model has no processor")
        text = self._written(question)
        arguments: dict[str, Any] = {
            "add_special_tokens": not question.messages,
            "return_tensors": "pt",
        }
        if pictures:
            return model.processor(text=[text], images=[pictures], **arguments)
        return model.tokenizer(text, **arguments)


def _options(sampling: Sampling, vocabulary: int) -> dict[str, Any]:
    """Arguments of `generate`."""
    options: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
    if bias := biases(sampling, vocabulary):
        options["sequence_bias"] = [[[id], value] for id, value in bias.items()]
    if not sampling.temperature:
        return options | {"do_sample": False}
    return options | {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or None,
        "typical_p": sampling.typical_p,
    }


def _nothing(token: Token, outcome: Outcome | None) -> bool:
    """Stops an answer before its first token is told."""
    return False


class _Stream:
    """A streamer for `generate` that emits tokens, and stops it when `emit` returns False."""

    def __init__(
        self, model: HfModel, session: Session | None, emit: Emit, sampling: Sampling
    ) -> None:
        self._model, self._session, self._emit = model, session, emit
        self._ends = model.stop_tokens()
        self._logits: Any = None
        self._top = sampling.top_logprobs
        self._logprobs = sampling.logprobs or self._top > 0
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
        top = self._logprobs and likeliest(self._logits, self._top, self._piece)
        token = Token(id, self._written(id).encode(), ends, logprob, top or ())
        outcome = None if self._session is None else self._session.current
        if not self._emit(token, outcome):
            self.finish = "stopped"
        elif ends:
            self.finish = "eos_token"

    def _piece(self, id: int) -> bytes:
        return str(self._model.tokenizer.decode([id])).encode()

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


def _image(picture: Picture) -> Image.Image:
    return Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
