"""Ollama's dialect, for the apps that speak no other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field

from steerbridge.serving import JSON_OBJECT, Sampling
from steerbridge_serve.asked import Asked, Turn, begun
from steerbridge_serve.body import (
    Body,
    Refusal,
    Repetition,
    Sampled,
    Stops,
    cooled,
    from_base64,
)
from steerbridge_serve.openai import ONE_MODEL
from steerbridge_serve.problems import NotAllowed
from steerbridge_serve.service import Run, Service
from steerbridge_serve.worker import Finish, Step

VERSION: Final = "0.12.0"
"""Of Ollama's interface: clients ask for one that they know."""
THIS_SERVER: Final = "set when this server is started"


class Options(Sampled):
    """The `options` of a request."""

    num_predict: int | None = Field(None, ge=-2, description="below 1: as the context holds")
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(0.8, description="0: greedy")
    repeat_penalty: Repetition = 1.1
    stop: Stops | str | None = None
    HARMLESS: ClassVar[Mapping[str, str]] = {
        "num_ctx": THIS_SERVER,
        "num_batch": THIS_SERVER,
        "num_thread": THIS_SERVER,
        "num_gpu": THIS_SERVER,
        "main_gpu": THIS_SERVER,
        "num_keep": THIS_SERVER,
        "numa": THIS_SERVER,
        "low_vram": THIS_SERVER,
        "f16_kv": THIS_SERVER,
        "use_mmap": THIS_SERVER,
        "use_mlock": THIS_SERVER,
        "vocab_only": THIS_SERVER,
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "repeat_last_n": Refusal((64,)),
        "mirostat": Refusal((0,)),
        "mirostat_tau": Refusal((5.0,)),
        "mirostat_eta": Refusal((0.1,)),
        "tfs_z": Refusal((1.0,)),
        "penalize_newline": Refusal((True,)),
        "draft_num_predict": Refusal((0,)),
    }

    def sampling(self, form: Any) -> Sampling:
        """With Ollama's defaults: temperature 0.8, top_k 40, top_p 0.9."""
        limit = self.num_predict
        schema = JSON_OBJECT if form == "json" else json.dumps(form) if form else None
        return Sampling(
            max_new_tokens=None if limit is None or limit < 1 else limit,
            temperature=cooled(self.temperature),
            repetition_penalty=self.repeat_penalty,
            json_schema=schema,
            **self.sampled(top_k=40, top_p=0.9),
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class OllamaMessage(Body):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str = ""
    images: list[str] | None = Field(None, description="picture files in base64")
    HARMLESS: ClassVar[Mapping[str, str]] = {
        "thinking": "no template is given an earlier answer's reasoning"
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "tool_calls": Refusal(([],)),
        "tool_name": Refusal(("",)),
        "tool_call_id": Refusal(("",)),
    }

    @property
    def turn(self) -> Turn:
        return Turn(self.role, (*_files(self.images), self.content))


class _Ollama(Body):
    """What chats and prompts have in common."""

    options: Options = Field(default_factory=Options)
    format: Literal["", "json"] | dict[str, Any] | None = None
    stream: bool = True
    HARMLESS: ClassVar[Mapping[str, str]] = {
        "model": ONE_MODEL,
        "keep_alive": "the model is always loaded",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "tools": Refusal(([],)),
        "think": Refusal((False,)),
        "logprobs": Refusal((False,), "POST /v1/chat/completions"),
        "top_logprobs": Refusal((0,), "POST /v1/chat/completions"),
        "truncate": Refusal((False,), "a part that is cut off is not judged"),
        "shift": Refusal((False,), "a part that is cut off is not judged"),
    }

    def _asked(self, **what: Any) -> Asked:
        return Asked(self.options.sampling(self.format), stops=self.options.stops, **what)


class OllamaChat(_Ollama):
    """The body of POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] = Field(
        default_factory=list, description="none: it is ready"
    )

    @property
    def asked(self) -> Asked | None:
        """The request; None if there is nothing to answer.

        Raises:
            DataError: a picture that is not base64.
        """
        if not self.messages:
            return None
        turns, prefill = begun(tuple(message.turn for message in self.messages))
        return self._asked(turns=turns, prefill=prefill)


class OllamaGenerate(_Ollama):
    """The body of POST /api/generate."""

    prompt: str = Field("", description="none: it is ready")
    system: str = ""
    images: list[str] | None = Field(None, description="picture files in base64")
    raw: bool = Field(False, description="true: without the template (--raw-prompts)")
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **_Ollama.REFUSED,
        "template": Refusal(("",)),
        "context": Refusal(([],), "POST /api/chat"),
        "suffix": Refusal(("",)),
    }

    @property
    def asked(self) -> Asked | None:
        """The request; None if there is nothing to answer.

        Raises:
            DataError: a picture that is not base64.
        """
        if not self.prompt:
            return None
        if self.raw:
            return self._asked(prompt=self.prompt)
        system = (Turn("system", (self.system,)),) if self.system else ()
        question = Turn("user", (*_files(self.images), self.prompt))
        return self._asked(turns=(*system, question))


class Show(Body):
    """The body of POST /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="an older name of model")
    HARMLESS: ClassVar[Mapping[str, str]] = {"verbose": "there is no more to tell"}


def _files(images: list[str] | None) -> tuple[bytes, ...]:
    return tuple(from_base64(image, "images") for image in images or ())


class Ollama:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._began = _time()

    # -------------------------------------------------------- the model

    async def version(self) -> Any:
        return {"version": VERSION}

    async def tags(self) -> Any:
        return {"models": [self._model()]}

    async def running(self) -> Any:
        return {"models": [{**self._model(), "expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}]}

    async def show(self, body: Show) -> Any:
        engine = self._service.engine
        asked = body.model or body.name
        if asked and asked.removesuffix(":latest") != engine.name:
            raise NotAllowed(404, f"model: expected {engine.name}, found {asked[:80]}")
        base = engine.package.spec.base_model
        return {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": self._model()["details"],
            "model_info": {
                "general.architecture": base.architecture,
                f"{base.model_type}.context_length": engine.context,
                f"{base.model_type}.embedding_length": base.hidden_size,
                f"{base.model_type}.block_count": base.num_layers,
            },
            "capabilities": ["completion", *(["vision"] if engine.vision else [])],
            "modified_at": self._began,
        }

    def _model(self) -> dict[str, Any]:
        engine = self._service.engine
        family = engine.package.spec.base_model.model_type
        return {
            "name": engine.name,
            "model": engine.name,
            "modified_at": self._began,
            "size": 0,
            "digest": sha256(engine.name.encode()).hexdigest(),
            "details": {
                "parent_model": "",
                "format": "gguf",
                "family": family,
                "families": [family],
                "parameter_size": "",
                "quantization_level": "",
            },
        }

    # -------------------------------------------------------- answers

    async def chat(self, body: OllamaChat, request: Request) -> Any:
        form = lambda text: {"message": {"role": "assistant", "content": text}}  # noqa: E731
        return await self._answer(body.asked, body.stream, form, request)

    async def generate(self, body: OllamaGenerate, request: Request) -> Any:
        return await self._answer(body.asked, body.stream, lambda text: {"response": text}, request)

    async def _answer(self, asked: Asked | None, stream: bool, form: Any, request: Request) -> Any:
        if asked is None:
            return {**self._head(), **form(""), "done": True, "done_reason": "load"}
        run = self._service.start(asked, request)
        if stream:
            lines = self._lines(run, form)
            return await self._service.streamed(run, request.url.path, lines, events=False)
        answer = (await run.answers())[0]
        whole = {**self._head(), **form(answer.text), **self._end(run, answer.finish)}
        return JSONResponse(whole, headers=self._service.headers(answer.finish.outcome))

    async def _lines(self, run: Run, form: Any) -> AsyncIterator[Any]:
        async for _, event in run.events():
            if isinstance(event, Step):
                if event.text:
                    steering = self._service.steering(event.outcome, run.asked)
                    line = {**self._head(), **form(event.text), "done": False}
                    yield {**line, "steering": steering}
            else:
                yield {**self._head(), **form(event.text), **self._end(run, event)}

    def _head(self) -> dict[str, Any]:
        return {"model": self._service.engine.name, "created_at": _time()}

    def _end(self, run: Run, ended: Finish) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": "length" if ended.reason == "length" else "stop",
            "total_duration": ended.prompt_ns + ended.answer_ns,
            "load_duration": 0,
            "prompt_eval_count": ended.prompt_tokens,
            "prompt_eval_duration": ended.prompt_ns,
            "eval_count": ended.tokens,
            "eval_duration": ended.answer_ns,
            "steering": self._service.steering(ended.outcome, run.asked),
        }


def _time() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
