"""The `llama.cpp` runtime behind a server (see `steerbridge.serving`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from llama_cpp import LLAMA_DEFAULT_SEED as RANDOM_SEED
from llama_cpp import LogitsProcessorList, llama_sampler_free, llama_sampler_init_grammar
from llama_cpp.llama_grammar import LlamaGrammar

from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.serving import (
    Check,
    Emit,
    Ended,
    Engine,
    Prompt,
    Question,
    Sampling,
    Token,
    attached,
    biases,
    likeliest,
    room,
)
from steerbridge_llama_cpp.llama import steer
from steerbridge_llama_cpp.model import LlamaCppModel, open_model
from steerbridge_llama_cpp.native import RUNTIME

SCHEMA_BYTES: Final = 1 << 14
GRAMMAR_BYTES: Final = 1 << 16


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

    def prompt(self, question: Question) -> Prompt:
        """See `Engine`."""
        if question.pictures:
            raise UnsupportedFeature(RUNTIME, "tokens of a prompt with pictures")
        ids = self._model.tokens(question)
        tokens = tuple(Token(id, self._model.piece(id, special=True)) for id in ids)
        return Prompt(self._model.written(question)[0], tokens)

    def answer(self, question: Question, sampling: Sampling, emit: Emit, check: Check) -> Ended:
        """See `Engine`."""
        self._session.between_batches = check
        try:
            with attached(self._session, question.steered):
                ended = self._answer(question, sampling, emit)
        except BaseException:
            self._llama.reset()  # recovers a failed session
            raise
        if ended.outcome is not None and any(v.unjudged for v in ended.outcome.verdicts):
            # States that are not finite would reach the next prompt: masked, NaN is still NaN.
            self._llama.reset()
            self._llama._ctx.kv_cache_clear()
        return ended

    def _answer(self, question: Question, sampling: Sampling, emit: Emit) -> Ended:
        options = self._options(sampling)
        tokens = self._model.evaluated(question)
        limit = room(len(tokens), sampling, self.context)
        # An earlier request's seed would be kept.
        self._llama.set_seed(RANDOM_SEED if sampling.seed is None else sampling.seed)
        finish, outcome = "length", None
        with contextlib.closing(self._llama.generate(tokens, **options)) as chosen:
            for count, id in enumerate(chosen, 1):
                outcome = self._session.current if question.steered else None
                if not limit:
                    break
                if self._model.ends_turn(id):
                    finish = "eos_token"
                token = self._told(id, sampling, finish == "eos_token")
                if not emit(token, outcome):
                    finish = "stopped"
                if finish != "length" or count == limit:
                    break
        return Ended(finish, len(tokens), outcome)

    def _told(self, id: int, sampling: Sampling, special: bool) -> Token:
        model = self._model
        logprob = model.log_probability(id) if sampling.logprobs else None
        top = sampling.top_logprobs and likeliest(
            model.last_logits, sampling.top_logprobs, partial(model.piece, special=True)
        )
        return Token(id, model.piece(id), special, logprob, top or ())

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        """Arguments of `Llama.generate`."""
        options: dict[str, Any] = {
            "temp": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "typical_p": sampling.typical_p,
            "repeat_penalty": sampling.repetition_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
        }
        if sampling.json_schema is not None:
            options["grammar"] = grammar(sampling.json_schema, self._llama._model.vocab)
        if sampling.logit_bias:
            bias = np.zeros(self._llama.n_vocab(), np.float32)
            for id, value in biases(sampling, bias.size).items():
                bias[id] = value
            add = lambda _, scores: scores + bias  # noqa: E731
            options["logits_processor"] = LogitsProcessorList([add])
        return options


def grammar(schema: str, vocab: Any) -> LlamaGrammar:
    """llama.cpp's grammar for a JSON Schema, which it was seen to read.

    Raises:
        DataError: it cannot be expressed as one, or refers to what is elsewhere.
    """
    want = f"one of {SCHEMA_BYTES} bytes at most"
    if len(schema.encode()) > SCHEMA_BYTES:
        raise DataError(Problem("json_schema", want, str(len(schema.encode()))))
    want = "a JSON Schema that llama.cpp makes a grammar of"
    try:
        made = LlamaGrammar.from_json_schema(schema, verbose=False)
    except Exception as error:  # the converter asserts, looks up keys and recurses
        raise DataError(Problem("json_schema", want, str(error) or repr(error))) from error
    text = made._grammar.encode()
    if len(text) > GRAMMAR_BYTES:
        want = f"one whose grammar has {GRAMMAR_BYTES} bytes at most"
        raise DataError(Problem("json_schema", want, str(len(text))))
    # Null for a grammar that it cannot read; in a chain of samplers that would end the process.
    sampler = llama_sampler_init_grammar(vocab, text, made._root.encode())
    if not sampler:
        raise DataError(Problem("json_schema", want, "a grammar that it does not read"))
    llama_sampler_free(sampler)
    return made
