"""What `steerbridge serve --runtime toy` opens: an `Engine` (steerbridge/serving.py).

The server does HTTP, queues and limits; an engine answers one request at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerbridge import SteeringPackage
from steerbridge.errors import UnsupportedFeature
from steerbridge.serving import (
    Emit,
    Ended,
    Question,
    Sampling,
    Token,
    chat_messages,
    check_room,
)
from steerbridge.stats import log_probability
from toy_runtime import NAME, Guard, ToyModel


class ToyEngine:
    """Answers greedily; the class is its own `EngineOpener`."""

    vision = False

    def __init__(
        self,
        model: str | Path,
        package: SteeringPackage,
        *,
        context: int,
        ignore: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self._model = ToyModel(model, **options)
        self.package = self._model.checked(package, ignore)
        self.name = self._model.facts.name
        self.context = min(context, self._model.context) if context else self._model.context

    def answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        """See `Engine`."""
        if question.images or sampling.temperature or sampling.repetition_penalty != 1:
            raise UnsupportedFeature(NAME, "images and sampling", "temperature 0")
        tokenizer = self._model.tokenizer
        text = question.prompt
        if question.messages:
            text = tokenizer.render(chat_messages(question))
        ids = tokenizer.encode(text)
        check_room(len(ids), sampling, self.context)
        guard = Guard(self.package, len(ids)) if question.steered else None
        outcome = None
        for id, logits in self._model.answer(ids, guard, sampling.max_new_tokens):
            outcome = guard.outcome if guard else None  # known before the first token
            ends = id == tokenizer.end
            token = Token(id, tokenizer.decode([id]), ends, log_probability(logits, id))
            if not emit(token, outcome):
                return Ended("stopped", len(ids), outcome)
            if ends:
                return Ended("eos_token", len(ids), outcome)
        return Ended("length", len(ids), outcome)
