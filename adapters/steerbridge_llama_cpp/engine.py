"""The `llama.cpp` runtime behind a server (see `steerbridge.serving`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from steerbridge_llama_cpp.llama import steer
from steerbridge_llama_cpp.model import LlamaCppModel, open_model


def open_engine(
    model: str | Path,
    package: SteeringPackage,
    *,
    context: int,
    ignore: Sequence[str] = (),
    **options: Any,
) -> Engine:
    """Open a GGUF file and attach the package; see `EngineOpener` and `open_model`."""
    opened = open_model(model, n_ctx=context, **options)
    return LlamaCppEngine(opened, package, ignore, vision="mmproj" in options)


class LlamaCppEngine:
    """Answers from one `llama_cpp.Llama`; cached prefixes are used."""

    def __init__(
        self, model: LlamaCppModel, package: SteeringPackage, ignore: Sequence[str], vision: bool
    ) -> None:
        self._model = model
        self._llama: Any = model.llama
        self._session = steer(self._llama, package, ignore=ignore)
        self.package = self._session.package
        self.name = model.facts.name or str(self._llama.model_path)
        self.context = int(self._llama.n_ctx())
        self.vision = vision

    def answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        """See `Engine`."""
        try:
            with attached(self._session, question.steered):
                ended = self._answer(question, sampling, emit)
        except Exception:
            self._llama.reset()  # recovers a failed session
            raise
        if ended.outcome is not None and any(v.unjudged for v in ended.outcome.verdicts):
            # States that are not finite would reach the next prompt: masked, NaN is still NaN.
            self._llama.reset()
            self._llama._ctx.kv_cache_clear()
        return ended

    def _answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        tokens = self._model.evaluated_chat(
            chat_messages(question), question.images, question.prompt
        )
        check_room(len(tokens), sampling, self.context)
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
