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
    Check,
    Emit,
    Ended,
    Prompt,
    Question,
    Sampling,
    Token,
    chat_messages,
    check_sampling,
    room,
)
from steerbridge.stats import log_probability
from toy_runtime import NAME, Guard, ToyModel

# The fields of Sampling that this engine does not do.
SAMPLING = ("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty")
SAMPLING += ("logit_bias", "json_schema", "top_logprobs")


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

    def prompt(self, question: Question) -> Prompt:
        """See `Engine`."""
        if question.pictures:
            raise UnsupportedFeature(NAME, "pictures")
        tokenizer = self._model.tokenizer
        text = question.prompt
        if question.messages:
            text = tokenizer.render(chat_messages(question)) + question.prefill
        ids = tokenizer.encode(text)
        return Prompt(text, tuple(Token(id, tokenizer.decode([id])) for id in ids))

    def answer(self, question: Question, sampling: Sampling, emit: Emit, check: Check) -> Ended:
        """See `Engine`."""
        check_sampling(NAME, sampling, *SAMPLING)
        tokenizer = self._model.tokenizer
        ids = [token.id for token in self.prompt(question).tokens]
        limit = room(len(ids), sampling, self.context)
        guard = Guard(self.package, len(ids)) if question.steered else None
        outcome = None
        for id, logits in self._model.answer(ids, guard, max(limit, 1)):
            check()
            outcome = guard.outcome if guard else None  # known before the first token
            if not limit:
                break
            ends = id == tokenizer.end
            token = Token(id, tokenizer.decode([id]), ends, log_probability(logits, id))
            if not emit(token, outcome):
                return Ended("stopped", len(ids), outcome)
            if ends:
                return Ended("eos_token", len(ids), outcome)
        return Ended("length", len(ids), outcome)
