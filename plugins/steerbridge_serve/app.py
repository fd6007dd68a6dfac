"""The HTTP interfaces: TGI's and OpenAI's, with the verdict in every answer, and a web page.

Field `steering` of an answer (and of each event of a stream), header `X-Steerbridge-Fired`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sse_starlette import EventSourceResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerbridge.errors import DataError, SteerbridgeError, SteeringFailed, UnsupportedFeature
from steerbridge.serving import Ended, Question, Sampling
from steerbridge_serve import answers
from steerbridge_serve.answers import Chat, Text
from steerbridge_serve.schemas import ChatCompletion, Generate
from steerbridge_serve.worker import Job, Overloaded, Step, Worker

FIRED: Final = "X-Steerbridge-Fired"
PAGE: Final = Path(__file__).with_name("page")
# The page consists of its own three files; text of an answer cannot load or run anything.
PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
POLL: Final = 0.25  # seconds between checks that a client is still connected


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper limits of one request."""

    body_bytes: int = 8 << 20
    image_pixels: int = 16_000_000


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self, worker: Worker) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "steerbridge_requests", "Requests by status", ["status"], registry=own
        )
        self.verdicts = Counter(
            "steerbridge_verdicts", "Verdicts on prompts", ["fired"], registry=own
        )
        self.tokens = Counter("steerbridge_tokens", "Tokens generated", registry=own)
        self.seconds = Histogram(
            "steerbridge_request_seconds", "Seconds from arrival to end", registry=own
        )
        waiting = Gauge("steerbridge_waiting", "Requests in the queue", registry=own)
        waiting.set_function(lambda: worker.waiting)


class BodyLimit:
    """Answers 413 to a body that is too large, without reading all of it."""

    def __init__(self, app: ASGIApp, size: int) -> None:
        self._app, self._size = app, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._size:
                raise HTTPException(413, f"body: expected {self._size} bytes at most")
            return message

        await self._app(scope, limited, send)


def create_app(
    worker: Worker,
    *,
    limits: Limits = Limits(),
    api_key: str = "",
    unsteered: bool = False,
) -> FastAPI:
    """The application around a worker, which is closed with it.

    Args:
        api_key: clients must send it as a bearer token; "": no key is required.
        unsteered: whether a chat may request an answer without the package.
    """

    @asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    def authorised(request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise HTTPException(401, "expected the server's API key as bearer token")

    app = FastAPI(title="steerbridge serve", version=version("steerbridge"), lifespan=closing)
    app.add_middleware(BodyLimit, size=limits.body_bytes)
    _add_errors(app)
    server = _Server(worker, limits, unsteered)

    @app.get("/health")
    async def health() -> PlainTextResponse:
        return PlainTextResponse("", 200 if worker.alive else 503)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE))
    router = APIRouter(dependencies=[Depends(authorised)])
    router.add_api_route("/info", server.info, methods=["GET"])
    router.add_api_route("/metrics", server.metrics_text, methods=["GET"])
    router.add_api_route("/v1/models", server.models, methods=["GET"])
    router.add_api_route("/generate", server.generate, methods=["POST"], response_model=None)
    router.add_api_route("/generate_stream", server.stream, methods=["POST"], response_model=None)
    router.add_api_route("/", server.either, methods=["POST"], response_model=None)
    router.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=None)
    app.include_router(router)
    return app


# ---------------------------------------------------------------- errors


def _add_errors(app: FastAPI) -> None:
    def problem(request: Request, status: int, kind: str, text: str) -> JSONResponse:
        if request.url.path.startswith("/v1/"):
            return JSONResponse({"error": {"message": text, "type": kind, "code": status}}, status)
        return JSONResponse({"error": text, "error_type": kind}, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return problem(request, 422, "validation", f"{where}: {first['msg']}")

    @app.exception_handler(SteerbridgeError)
    async def known(request: Request, error: SteerbridgeError) -> JSONResponse:
        status, kind = _status(error)
        answer = problem(request, status, kind, str(error))
        if status == 429:
            answer.headers["Retry-After"] = "1"
        return answer

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        kind = "authorization" if error.status_code == 401 else "validation"
        return problem(request, error.status_code, kind, error.detail)


def _status(error: BaseException) -> tuple[int, str]:
    """HTTP status, and TGI's name for the kind of error."""
    if isinstance(error, Overloaded):
        return 429, "overloaded"
    if isinstance(error, DataError | UnsupportedFeature):
        return 422, "validation"
    if isinstance(error, SteeringFailed):
        return 500, "steering"
    return 500, "generation"


# ---------------------------------------------------------------- requests


class _Server:
    def __init__(self, worker: Worker, limits: Limits, unsteered: bool) -> None:
        self._worker, self._limits, self._unsteered = worker, limits, unsteered
        self._spec = worker.engine.package.spec
        self._metrics = Metrics(worker)

    # -------------------------------------------------------- server and model

    async def info(self) -> dict[str, Any]:
        engine = self._worker.engine
        return {
            "model_id": engine.name,
            "model_pipeline_tag": "image-text-to-text" if engine.vision else "text-generation",
            "max_concurrent_requests": self._worker.size,
            "max_input_tokens": engine.context - 1,
            "max_total_tokens": engine.context,
            "max_best_of": 1,
            "max_stop_sequences": None,
            "max_client_batch_size": 1,
            "router": "steerbridge",
            "version": version("steerbridge"),
            "steering": {
                "name": self._spec.name,
                "base_model": self._spec.base_model.name,
                "probes": [
                    {
                        "probe": p.id,
                        "threshold": p.threshold,
                        "comparator": p.comparator,
                        "readings": [str(r) for r in p.readings],
                    }
                    for p in self._spec.probes
                ],
                "interventions": [f"{x.type} {x.id}" for x in self._spec.interventions],
                "rules": [rule.id for rule in self._spec.rules],
                "unsteered": self._unsteered,
            },
        }

    async def models(self) -> dict[str, Any]:
        model = {"id": self._worker.engine.name, "object": "model", "owned_by": "steerbridge"}
        return {"object": "list", "data": [model]}

    async def metrics_text(self) -> PlainTextResponse:
        text = generate_latest(self._metrics.registry).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # -------------------------------------------------------- TGI

    async def either(self, body: Generate, request: Request) -> Any:
        if body.stream:
            return await self.stream(body, request)
        answer = await self._generated(body, request)
        return JSONResponse([answer], headers=_fired(answer["steering"]))

    async def generate(self, body: Generate, request: Request) -> Any:
        answer = await self._generated(body, request)
        return JSONResponse(answer, headers=_fired(answer["steering"]))

    async def _generated(self, body: Generate, request: Request) -> dict[str, Any]:
        text, tokens = Text(body.parameters.stop or [], includes=True), []
        job = self._job(body.question, body.parameters.sampling)
        async for event in self._present(job, request):
            if isinstance(event, Step):
                told = text.add(event.token)
                tokens.append(answers.tgi_token(event.token, told))
                if text.stopped:
                    job.cancel()
            else:
                text.end()
                ended = event
        answer = {"generated_text": _full(body, text), "steering": answers.steering(ended.outcome)}
        if body.parameters.details:
            details = answers.tgi_details(ended, text, len(tokens), body.parameters.seed)
            answer["details"] = {**details, "prefill": [], "tokens": tokens}
        return answer

    async def stream(self, body: Generate, request: Request) -> Any:  # noqa: ARG002
        job = self._job(body.question, body.parameters.sampling)

        async def events(first: Step, rest: AsyncIterator[Step | Ended]) -> AsyncIterator[Any]:
            text, count, step = Text(body.parameters.stop or [], includes=True), 0, first
            # Each token is sent once the next event is known: the last one carries the text.
            while True:
                count += 1
                told = text.add(step.token)
                if text.stopped:
                    job.cancel()
                after = await anext(rest)
                if isinstance(after, Ended):
                    told += text.end()
                event = {
                    "index": count,
                    "token": answers.tgi_token(step.token, told),
                    "top_tokens": [],
                    "generated_text": None,
                    "details": None,
                    "steering": answers.steering(step.outcome),
                }
                if isinstance(after, Ended):
                    event |= {
                        "generated_text": _full(body, text),
                        "details": answers.tgi_details(after, text, count, body.parameters.seed),
                        "steering": answers.steering(after.outcome),
                    }
                    yield json.dumps(event)
                    return
                yield json.dumps(event)
                step = after

        return await self._streamed(
            job, events, lambda text, kind: {"error": text, "error_type": kind}
        )

    # -------------------------------------------------------- OpenAI

    async def chat(self, body: ChatCompletion, request: Request) -> Any:
        if not body.steering and not self._unsteered:
            raise HTTPException(403, "steering: unsteered answers are off (--allow-unsteered)")
        question = await asyncio.to_thread(body.question, self._limits.image_pixels)
        job = self._job(question, body.sampling)
        if body.stream:
            return await self._chat_stream(body, job)
        text, count = Text(body.stops, includes=False), 0
        async for event in self._present(job, request):
            if isinstance(event, Step):
                count += 1
                text.add(event.token)
                if text.stopped:
                    job.cancel()
            else:
                text.end()
                ended = event
        answer = Chat(self._worker.engine.name).whole(text.whole, ended, count)
        return JSONResponse(answer, headers=_fired(answer["steering"]))

    async def _chat_stream(self, body: ChatCompletion, job: Job) -> Any:
        async def events(first: Step, rest: AsyncIterator[Step | Ended]) -> AsyncIterator[Any]:
            chat, text, count = Chat(self._worker.engine.name), Text(body.stops, includes=False), 0
            yield json.dumps(chat.chunk({"content": ""}, first.outcome))
            event: Step | Ended = first
            while isinstance(event, Step):
                count += 1
                if told := text.add(event.token):
                    yield json.dumps(chat.chunk({"content": told}, event.outcome))
                if text.stopped:
                    job.cancel()
                event = await anext(rest)
            if told := text.end():
                yield json.dumps(chat.chunk({"content": told}, event.outcome))
            yield json.dumps(chat.chunk({}, event.outcome, answers.chat_finish(event)))
            if body.stream_options and body.stream_options.include_usage:
                yield json.dumps(chat.usage(event, count))
            yield "[DONE]"

        return await self._streamed(
            job, events, lambda text, kind: {"error": {"message": text, "type": kind}}
        )

    # -------------------------------------------------------- both

    def _job(self, question: Question, sampling: Sampling) -> Job:
        job = Job(question, sampling)
        try:
            self._worker.submit(job)
        except Overloaded:
            self._metrics.requests.labels("429").inc()
            raise
        return job

    async def _counted(self, job: Job) -> AsyncIterator[Step | Ended]:
        """The job's events, counted; the job is cancelled if they are not read to the end."""
        start, status = time.perf_counter(), "cancelled"
        try:
            async for event in job.events():
                if isinstance(event, Step):
                    self._metrics.tokens.inc()
                else:
                    if event.outcome is not None:
                        fired = str(bool(event.outcome.rules)).lower()
                        self._metrics.verdicts.labels(fired).inc()
                    status = "200"
                yield event
        except Exception as error:
            status = str(_status(error)[0])
            raise
        finally:
            job.cancel()
            self._metrics.requests.labels(status).inc()
            self._metrics.seconds.observe(time.perf_counter() - start)

    async def _present(self, job: Job, request: Request) -> AsyncIterator[Step | Ended]:
        """The job's events, while the client is connected."""
        events = self._counted(job)

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(POLL)
            job.cancel()

        watcher = asyncio.create_task(watch())
        try:
            async for event in events:
                yield event
        finally:
            watcher.cancel()
            await events.aclose()  # type: ignore[attr-defined]

    async def _streamed(
        self,
        job: Job,
        events: Callable[[Step, AsyncIterator[Step | Ended]], AsyncIterator[Any]],
        failure: Callable[[str, str], dict[str, Any]],
    ) -> EventSourceResponse:
        """Respond once the first token exists: the verdict is then known, and an earlier error
        has its own HTTP status. A later error is sent as an event."""
        rest = self._counted(job)
        first = await anext(rest)
        assert isinstance(first, Step)

        async def body() -> AsyncIterator[Any]:
            try:
                async for event in events(first, rest):
                    yield {"data": event}
            except SteerbridgeError as error:
                yield {"data": json.dumps(failure(str(error), _status(error)[1]))}
            finally:
                await rest.aclose()  # type: ignore[attr-defined]

        return EventSourceResponse(body(), headers=_fired(answers.steering(first.outcome)))


def _full(body: Generate, text: Text) -> str:
    return body.inputs + text.whole if body.parameters.return_full_text else text.whole


def _fired(steering: dict[str, Any] | None) -> dict[str, str]:
    return {} if steering is None else {FIRED: str(bool(steering["rules"])).lower()}
