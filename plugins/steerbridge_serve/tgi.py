"""TGI's dialect: raw prompts, tokens, and what the server says of itself."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest
from pydantic import Field

from steerbridge.serving import Alternative, Prompt, Sampling, Token
from steerbridge_serve.asked import Asked
from steerbridge_serve.body import Body, Refusal, Repetition, Sampled, Stops, cooled
from steerbridge_serve.openai import ChatCompletion, finite
from steerbridge_serve.service import Answer, Run, Service
from steerbridge_serve.worker import Finish, Step


class Grammar(Body):
    """The `grammar` of parameters."""

    type: Literal["json", "json_object"]
    value: dict[str, Any] = Field(description="a JSON Schema")


class Parameters(Sampled):
    """The `parameters` of a prompt."""

    max_new_tokens: int | None = Field(None, ge=1, description="default: as the context holds")
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    repetition_penalty: Repetition | None = None
    stop: Stops | None = None
    stop_sequences: Stops | None = Field(None, description="an older name of stop")
    return_full_text: bool | None = None
    details: bool = False
    top_n_tokens: int | None = Field(None, ge=0, le=5)
    grammar: Grammar | None = None
    HARMLESS: ClassVar[Mapping[str, str]] = {
        "use_cache": "of the hub's Inference API",
        "wait_for_model": "of the hub's Inference API",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "best_of": Refusal((1,), ""),
        "truncate": Refusal(instead="a part that is cut off is not judged"),
        "watermark": Refusal((False,), ""),
        "decoder_input_details": Refusal((False,), ""),
        "adapter_id": Refusal(("",), "adapters move what probes read"),
        "add_special_tokens": Refusal((True,), ""),
    }

    @property
    def stops(self) -> tuple[str, ...]:
        return (*(self.stop or ()), *(self.stop_sequences or ()))

    @property
    def sampling(self) -> Sampling:
        """As in TGI, any sampling parameter turns sampling on."""
        choices = (self.temperature, self.top_k, self.top_p, self.typical_p, self.min_p)
        warm = self.do_sample or any(value is not None for value in choices)
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=cooled(self.temperature or 1.0) if warm else 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            json_schema=None if self.grammar is None else json.dumps(self.grammar.value),
            logprobs=True,
            top_logprobs=self.top_n_tokens or 0,
            **self.sampled(),
        )


class Prompted(Body):
    """What the bodies with a raw prompt have in common."""

    inputs: str = Field(min_length=1)
    parameters: Parameters = Field(default_factory=Parameters)
    HARMLESS: ClassVar[Mapping[str, str]] = {"options": "of the hub's Inference API"}

    @property
    def asked(self) -> Asked:
        """The request."""
        parameters = self.parameters
        return Asked(
            parameters.sampling, prompt=self.inputs, stops=parameters.stops, keeps_stop=True
        )


class Generate(Prompted):
    """The body of POST /generate."""

    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "stream": Refusal((False,), "POST /generate_stream"),
        "adapter_id": Refusal(("",), "adapters move what probes read"),
    }


class GenerateStream(Prompted):
    """The body of POST /generate_stream."""

    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "stream": Refusal((True,), "POST /generate"),
        "adapter_id": Refusal(("",), "adapters move what probes read"),
    }


class GenerateEither(Prompted):
    """The body of POST /."""

    stream: bool = False


class Tokenize(Body):
    """The body of POST /tokenize."""

    inputs: str = Field(min_length=1)

    HARMLESS: ClassVar[Mapping[str, str]] = {
        "parameters": "nothing is generated",
        "stream": "nothing is generated",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {"add_special_tokens": Refusal((True,), "")}

    @property
    def asked(self) -> Asked:
        """The prompt."""
        return Asked(Sampling(0), prompt=self.inputs)


class TGI:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # -------------------------------------------------------- the server

    async def info(self) -> dict[str, Any]:
        service, engine = self._service, self._service.engine
        spec, shown = engine.package.spec, service.settings.show_scores
        probes = [
            {
                "probe": probe.id,
                "readings": list(probe.reads),
                **({"threshold": probe.threshold, "comparator": probe.comparator} if shown else {}),
            }
            for probe in spec.probes
        ]
        return {
            "model_id": engine.name,
            "model_pipeline_tag": "image-text-to-text" if engine.vision else "text-generation",
            "max_input_tokens": engine.context - 1,
            "max_total_tokens": engine.context,
            "max_best_of": 1,
            "max_stop_sequences": 16,
            "max_client_batch_size": 1,
            "router": "steerbridge",
            "version": version("steerbridge"),
            "steering": {
                "name": spec.name,
                "base_model": spec.base_model.name,
                "probes": probes,
                "interventions": [f"{x.type} {x.id}" for x in spec.interventions],
                "rules": [rule.id for rule in spec.rules],
                "unsteered": service.settings.unsteered,
                "raw_prompts": service.settings.raw_prompts,
                "scores": shown,
            },
        }

    async def metrics(self) -> PlainTextResponse:
        text = generate_latest(self._service.metrics.registry).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # -------------------------------------------------------- prompts

    async def generate(self, body: Generate, request: Request) -> Any:
        answer, headers = await self._generated(body, request)
        return JSONResponse(answer, headers=headers)

    async def stream(self, body: GenerateStream, request: Request) -> Any:
        return await self._streamed(body, request)

    async def either(self, body: GenerateEither, request: Request) -> Any:
        if body.stream:
            return await self._streamed(body, request)
        answer, headers = await self._generated(body, request)
        return JSONResponse([answer], headers=headers)

    async def _generated(
        self, body: Prompted, request: Request
    ) -> tuple[dict[str, Any], dict[str, str]]:
        run = self._service.start(body.asked, request)
        whole = (await run.answers())[0]
        outcome = whole.finish.outcome
        answer: dict[str, Any] = {
            "generated_text": _full(body, whole.text),
            "steering": self._service.steering(outcome, run.asked),
        }
        if body.parameters.details:
            answer["details"] = _whole_details(whole, body.parameters)
        return answer, self._service.headers(outcome)

    async def _streamed(self, body: Prompted, request: Request) -> Any:
        run = self._service.start(body.asked, request)
        lines = self._events(run, body)
        return await self._service.streamed(run, request.url.path, lines, events=True)

    async def _events(self, run: Run, body: Prompted) -> AsyncIterator[Any]:
        """Each token is sent once the next event is known: the last one carries the text."""
        step, count = None, 0
        async for _, event in run.events():
            if step is not None:
                count += 1
                yield self._event(run, body, step, count, event)
            step = event if isinstance(event, Step) else None

    def _event(
        self, run: Run, body: Prompted, step: Step, count: int, after: Step | Finish
    ) -> dict[str, Any]:
        ended = after if isinstance(after, Finish) else None
        token = told(step.token, step.text + (ended.text if ended else ""))
        text = run.jobs[0].text.whole
        return {
            "index": count,
            "token": token,
            "top_tokens": _top([step.token], body.parameters)[0],
            "generated_text": _full(body, text) if ended else None,
            "details": _details(ended, body.parameters) if ended else None,
            "steering": self._service.steering(step.outcome, run.asked),
        }

    # -------------------------------------------------------- tokens

    async def tokenize(self, body: Tokenize, request: Request) -> Any:
        return _spans(await self._service.prompt(body.asked, request))

    async def chat_tokenize(self, body: ChatCompletion, request: Request) -> Any:
        prompt = await self._service.prompt(body.asked, request)
        return {"tokenize_response": _spans(prompt), "templated_text": prompt.text}


def told(token: Token, text: str) -> dict[str, Any]:
    """A token as TGI tells it."""
    logprob = finite(token.logprob)
    return {"id": token.id, "text": text, "logprob": logprob, "special": token.special}


def _full(body: Prompted, text: str) -> str:
    return body.inputs + text if body.parameters.return_full_text else text


def _details(ended: Finish, parameters: Parameters) -> dict[str, Any]:
    return {
        "finish_reason": ended.reason,
        "generated_tokens": ended.tokens,
        "seed": parameters.seed,
        "input_length": ended.prompt_tokens,
    }


def _whole_details(answer: Answer, parameters: Parameters) -> dict[str, Any]:
    tokens = [told(step.token, step.text) for step in answer.steps]
    if tokens:
        tokens[-1]["text"] += answer.finish.text
    details = {**_details(answer.finish, parameters), "prefill": [], "tokens": tokens}
    if parameters.top_n_tokens:
        details["top_tokens"] = _top([step.token for step in answer.steps], parameters)
    return details


def _top(tokens: Sequence[Token], parameters: Parameters) -> list[list[dict[str, Any]]]:
    if not parameters.top_n_tokens:
        return [[] for _ in tokens]
    return [[_alternative(one) for one in token.top] for token in tokens]


def _alternative(one: Alternative) -> dict[str, Any]:
    token = Token(one.id, one.text, logprob=one.logprob)
    return told(token, one.text.decode(errors="replace"))


def _spans(prompt: Prompt) -> list[dict[str, Any]]:
    """The tokens of a prompt, with the characters of its text that each one covers: one that is
    not in the text, as the first may be, covers none."""
    spans, raw, at = [], prompt.text.encode(), 0
    for token in prompt.tokens:
        found = raw[at : at + len(token.text)] == token.text
        start, at = at, at + len(token.text) * found
        spans.append(
            {
                "id": token.id,
                "text": token.text.decode(errors="replace"),
                "start": len(raw[:start].decode(errors="ignore")),
                "stop": len(raw[:at].decode(errors="ignore")),
            }
        )
    return spans
