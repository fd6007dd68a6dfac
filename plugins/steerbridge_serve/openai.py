"""OpenAI's dialect: chats, raw completions, models, moderations."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from steerbridge.serving import JSON_OBJECT, Sampling, Token
from steerbridge_serve.asked import Asked, Turn, begun
from steerbridge_serve.body import (
    Body,
    Refusal,
    Repetition,
    Sampled,
    Stops,
    cooled,
    from_data_url,
)
from steerbridge_serve.problems import NotAllowed
from steerbridge_serve.service import FIRED, Answer, Run, Service, now
from steerbridge_serve.worker import Finish, Step

ONE_MODEL: Final = "there is one model"
ACCOUNT: Final = "of an account at OpenAI"
CHOICES: Final = 8
BIASES: Final = 1024

Bias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=BIASES)]


# ---------------------------------------------------------------- messages


class TextPart(Body):
    """A part of a message with type `text`."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """The `image_url` of a part."""

    url: str = Field(description="`data:image/...;base64,...`; nothing is fetched")
    HARMLESS: ClassVar[Mapping[str, str]] = {"detail": "pictures are used as they are"}


class ImagePart(Body):
    """A part of a message with type `image_url`."""

    type: Literal["image_url"]
    image_url: ImageUrl


Parts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(fail_fast=True)
]
Content = str | Parts


class ChatMessage(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    HARMLESS: ClassVar[Mapping[str, str]] = {
        "reasoning_content": "no template is given an earlier answer's reasoning",
        "annotations": "they are no text of the message",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "name": Refusal(),
        "tool_calls": Refusal(([],)),
        "tool_call_id": Refusal(),
        "function_call": Refusal(),
        "refusal": Refusal(instead="put it into content"),
        "audio": Refusal(),
    }

    @property
    def turn(self) -> Turn:
        """The message, its pictures as they are in their files."""
        role = "system" if self.role == "developer" else self.role
        return Turn(role, parts(self.content))


Messages = Annotated[list[ChatMessage], Field(fail_fast=True)]
"""The first one that is wrong is enough: each error costs much more than a message."""


def parts(content: Content | None) -> tuple[str | bytes, ...]:
    """Texts and picture files of a message's content.

    Raises:
        DataError: a URL that is none of a picture in base64.
    """
    if not content:
        return ()
    if isinstance(content, str):
        return (content,)
    return tuple(
        part.text if isinstance(part, TextPart) else from_data_url(part.image_url.url)
        for part in content
    )


def turns(messages: Sequence[ChatMessage]) -> tuple[tuple[Turn, ...], str]:
    """The turns of a chat, and the beginning of an answer with which it may end."""
    return begun(tuple(message.turn for message in messages))


# ---------------------------------------------------------------- bodies


class JsonSchema(Body):
    """The `json_schema` of a response format."""

    schema_: dict[str, Any] = Field(alias="schema")
    HARMLESS: ClassVar[Mapping[str, str]] = {
        "name": "it is no part of the schema",
        "description": "it is no part of the schema",
        "strict": "the schema is always followed",
    }


class ResponseFormat(Body):
    """The `response_format` of a completion."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema for type json_schema, and for no other")
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON Schema that an answer must follow."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return JSON_OBJECT if self.type == "json_object" else None


class StreamOptions(Body):
    """The `stream_options` of a completion."""

    include_usage: bool = False
    HARMLESS: ClassVar[Mapping[str, str]] = {"include_obfuscation": "events are never padded"}


COMPLETION_REFUSED: Final[Mapping[str, Refusal]] = {
    "best_of": Refusal((1,)),
    "echo": Refusal((False,)),
    "grammar": Refusal(("",), "response_format"),
    "guided_json": Refusal(instead="response_format"),
    "guided_regex": Refusal(),
    "guided_choice": Refusal(),
    "guided_grammar": Refusal(),
    "ignore_eos": Refusal((False,)),
    "min_tokens": Refusal((0,)),
    "stop_token_ids": Refusal(([],)),
    "skip_special_tokens": Refusal((True,)),
    "use_beam_search": Refusal((False,)),
    "repeat_last_n": Refusal((64,)),
    "mirostat": Refusal((0,)),
}


class Completed(Sampled):
    """What chats and raw completions have in common."""

    max_tokens: int | None = Field(None, ge=1, description="default: as the context holds")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(1.0, description="0: greedy")
    repetition_penalty: Repetition = 1.0
    stop: Stops | str | None = None
    n: int = Field(1, ge=1, le=CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: Bias | None = Field(None, description="by token id")
    response_format: ResponseFormat | None = None
    HARMLESS: ClassVar[Mapping[str, str]] = {
        "user": ACCOUNT,
        "metadata": ACCOUNT,
        "store": ACCOUNT,
        "service_tier": ACCOUNT,
        "safety_identifier": ACCOUNT,
        "prompt_cache_key": ACCOUNT,
        "prompt_cache_retention": ACCOUNT,
        "cache_prompt": "cached prefixes are used where they change nothing",
        "id_slot": ONE_MODEL,
    }

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, limit: int | None, logprobs: int | None) -> Sampling:
        """Where and how tokens are chosen. As in OpenAI's API, the temperature is 1 by default.

        Args:
            logprobs: of so many tokens beside each chosen one; None: of none.
        """
        form = self.response_format
        return Sampling(
            max_new_tokens=limit,
            temperature=cooled(self.temperature),
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            json_schema=None if form is None else form.schema_text,
            logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
            **self.sampled(),
        )


class ChatCompletion(Completed):
    """The body of POST /v1/chat/completions."""

    messages: Messages = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    steering: bool = Field(True, description="false: without the package (--allow-unsteered)")
    model: str | None = Field(
        None, description=f"{ONE_MODEL}; `tgi`, as TGI's clients call it: chunks as TGI's"
    )
    HARMLESS: ClassVar[Mapping[str, str]] = {
        **Completed.HARMLESS,
        "parallel_tool_calls": "there are no tools",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **COMPLETION_REFUSED,
        "tools": Refusal(([],)),
        "tool_choice": Refusal(("none", "auto")),
        "tool_prompt": Refusal(("",)),
        "functions": Refusal(([],)),
        "function_call": Refusal(("none", "auto")),
        "audio": Refusal(),
        "modalities": Refusal((["text"],)),
        "prediction": Refusal(),
        "reasoning_effort": Refusal(("none",)),
        "verbosity": Refusal(("medium",)),
        "web_search_options": Refusal(),
        "moderation": Refusal(instead="POST /v1/moderations"),
        "continue_final_message": Refusal((False,), "end with an assistant's message"),
        "add_generation_prompt": Refusal((True,)),
        "add_special_tokens": Refusal((False,)),
        "chat_template": Refusal(),
        "chat_template_kwargs": Refusal(({},)),
        "guideline": Refusal(),
        "logit_processor": Refusal(),
    }

    @property
    def asked(self) -> Asked:
        """The request.

        Raises:
            DataError: a picture that is none.
        """
        chat, prefill = turns(self.messages)
        beside = (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None
        return Asked(
            self.sampling(self.max_completion_tokens or self.max_tokens, beside),
            turns=chat,
            prefill=prefill,
            stops=self.stops,
            count=self.n,
            steered=self.steering,
        )


class RawCompletion(Completed):
    """The body of POST /v1/completions."""

    HARMLESS: ClassVar[Mapping[str, str]] = {**Completed.HARMLESS, "model": ONE_MODEL}

    prompt: str = Field(min_length=1)
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **COMPLETION_REFUSED,
        "suffix": Refusal(("",)),
    }

    @property
    def asked(self) -> Asked:
        return Asked(
            self.sampling(self.max_tokens, self.logprobs),
            prompt=self.prompt,
            stops=self.stops,
            count=self.n,
        )


class Moderation(Body):
    """The body of POST /v1/moderations."""

    input: Annotated[list[str], Field(min_length=1, max_length=64)] | Content | None = None
    messages: Messages | None = Field(
        None, min_length=1, description="ours: a whole chat, in place of input"
    )
    HARMLESS: ClassVar[Mapping[str, str]] = {"model": ONE_MODEL}

    @model_validator(mode="after")
    def _one(self) -> Moderation:
        if (self.input is None) == (self.messages is None) or self.input == []:
            raise ValueError("expected either input or messages")
        return self

    @property
    def asked(self) -> list[Asked]:
        """The prompts to judge.

        Raises:
            DataError: a picture that is none.
        """
        if self.messages is not None:
            chat, prefill = turns(self.messages)
            return [Asked(Sampling(0), turns=chat, prefill=prefill)]
        given: list[Any] = [self.input]
        if isinstance(self.input, list) and all(isinstance(one, str) for one in self.input):
            given = list(self.input)
        return [Asked(Sampling(0), turns=(Turn("user", parts(one)),)) for one in given]


# ---------------------------------------------------------------- answers


def finish(ended: Finish) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "length" if ended.reason == "length" else "stop"


def usage(ends: Sequence[Finish]) -> dict[str, int]:
    """The tokens of a request; its prompt is counted once."""
    prompt, new = ends[0].prompt_tokens, sum(end.tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def finite(logprob: float | None) -> float | None:
    """JSON has neither NaN nor infinity; a model whose states overflow gives them."""
    return logprob if logprob is not None and math.isfinite(logprob) else None


def _logprob(token: Any) -> dict[str, Any]:
    text = token.text
    return {
        "token": text.decode(errors="replace"),
        "logprob": finite(token.logprob),
        "bytes": list(text),
    }


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        {**_logprob(token), "top_logprobs": [_logprob(one) for one in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def raw_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of a raw completion's choice."""
    texts = [token.text.decode(errors="replace") for token in tokens]
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
    tops = [
        {one.text.decode(errors="replace"): finite(one.logprob) for one in t.top} for t in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


class OpenAI:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # -------------------------------------------------------- models

    async def models(self) -> Any:
        return {"object": "list", "data": [self._model()]}

    async def model(self, id: str) -> Any:
        if id != self._service.engine.name:
            raise NotAllowed(404, f"model: expected {self._service.engine.name}, found {id[:80]}")
        return self._model()

    def _model(self) -> dict[str, Any]:
        engine = self._service.engine
        return {"id": engine.name, "object": "model", "created": 0, "owned_by": "steerbridge"}

    # -------------------------------------------------------- chats

    async def chat(self, body: ChatCompletion, request: Request) -> Any:
        run = self._service.start(body.asked, request)
        head = self._head("chatcmpl")
        if body.stream:
            lines = self._chat_chunks(run, head, body)
            return await self._service.streamed(run, request.url.path, lines, events=True)
        answers = await run.answers()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": finish(answer.finish),
                "logprobs": _whole_logprobs(chat_logprobs, answer, run),
            }
            for index, answer in enumerate(answers)
        ]
        return self._response(
            run, {**head, "object": "chat.completion", "choices": choices}, answers
        )

    async def _chat_chunks(
        self, run: Run, head: dict[str, Any], body: ChatCompletion
    ) -> AsyncIterator[Any]:
        head = {**head, "object": "chat.completion.chunk"}
        as_tgi = body.model == "tgi"
        begun: set[int] = set()
        ends: list[Finish] = []
        async for index, event in run.events():
            delta: dict[str, Any] = {"content": event.text} if event.text else {}
            if as_tgi or index not in begun:  # else official helpers join role to role
                delta = {"role": "assistant", "content": event.text}
                begun.add(index)
            if as_tgi:
                delta["tool_calls"] = None  # its old client requires the field
            choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None}
            choice["logprobs"] = None
            if isinstance(event, Finish):
                ends.append(event)
                choice["finish_reason"] = finish(event)
            elif run.asked.sampling.logprobs:
                choice["logprobs"] = chat_logprobs([event.token])
            if delta or choice["logprobs"] or choice["finish_reason"]:
                yield self._chunk(run, event, head, choice)
        for line in self._stream_end(run, head, body, ends):
            yield line

    # -------------------------------------------------------- raw completions

    async def complete(self, body: RawCompletion, request: Request) -> Any:
        run = self._service.start(body.asked, request)
        head = {**self._head("cmpl"), "object": "text_completion"}
        if body.stream:
            lines = self._raw_chunks(run, head, body)
            return await self._service.streamed(run, request.url.path, lines, events=True)
        answers = await run.answers()
        choices = [
            {
                "index": index,
                "text": answer.text,
                "finish_reason": finish(answer.finish),
                "logprobs": _whole_logprobs(raw_logprobs, answer, run),
            }
            for index, answer in enumerate(answers)
        ]
        return self._response(run, {**head, "choices": choices}, answers)

    async def _raw_chunks(
        self, run: Run, head: dict[str, Any], body: RawCompletion
    ) -> AsyncIterator[Any]:
        ends: list[Finish] = []
        async for index, event in run.events():
            choice: dict[str, Any] = {"index": index, "text": event.text, "logprobs": None}
            reason = None
            if isinstance(event, Finish):
                ends.append(event)
                reason = finish(event)
            elif run.asked.sampling.logprobs:
                choice["logprobs"] = raw_logprobs([event.token])
            yield self._chunk(run, event, head, {**choice, "finish_reason": reason})
        for line in self._stream_end(run, head, body, ends):
            yield line

    # -------------------------------------------------------- moderations

    async def moderate(self, body: Moderation, request: Request) -> Any:
        runs = [self._service.start(asked, request) for asked in body.asked]
        results = [self._result(run, (await run.answers())[0].finish) for run in runs]
        answer = {
            "id": f"modr-{uuid.uuid4().hex}",
            "model": self._service.engine.name,
            "results": results,
        }
        flagged = any(result["flagged"] for result in results)
        return JSONResponse(answer, headers={FIRED: str(flagged).lower()})

    def _result(self, run: Run, ended: Finish) -> dict[str, Any]:
        outcome = ended.outcome
        assert outcome is not None
        scores = {v.probe: float(v.fired) for v in outcome.verdicts}
        if self._service.settings.show_scores:
            known = {v.probe: v.score for v in outcome.verdicts if math.isfinite(v.score)}
            scores |= known
        kinds = ["text", *(["image"] if run.asked.pictures else [])]
        return {
            "flagged": outcome.fired,
            "categories": {v.probe: v.fired for v in outcome.verdicts},
            "category_scores": scores,
            "category_applied_input_types": {v.probe: kinds for v in outcome.verdicts},
            "steering": self._service.steering(outcome, run.asked),
        }

    # -------------------------------------------------------- inside

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": now(),
            "model": self._service.engine.name,
            "system_fingerprint": "steerbridge",
        }

    def _chunk(
        self, run: Run, event: Step | Finish, head: dict[str, Any], choice: dict[str, Any]
    ) -> dict[str, Any]:
        steering = self._service.steering(event.outcome, run.asked)
        return {**head, "choices": [choice], "steering": steering}

    def _stream_end(
        self, run: Run, head: dict[str, Any], body: Completed, ends: Sequence[Finish]
    ) -> list[Any]:
        if body.stream_options and body.stream_options.include_usage:
            steering = self._service.steering(ends[-1].outcome, run.asked)
            last = {**head, "choices": [], "usage": usage(ends), "steering": steering}
            return [last, "[DONE]"]
        return ["[DONE]"]

    def _response(self, run: Run, content: dict[str, Any], answers: Sequence[Answer]) -> Any:
        ends = [answer.finish for answer in answers]
        content |= {
            "usage": usage(ends),
            "steering": self._service.steering(ends[0].outcome, run.asked),
        }
        return JSONResponse(content, headers=self._service.headers(ends[0].outcome))


def _whole_logprobs(form: Any, answer: Answer, run: Run) -> Any:
    if not run.asked.sampling.logprobs:
        return None
    return form([step.token for step in answer.steps])
