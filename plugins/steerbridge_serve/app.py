"""The application: the dialects' routes, a page, errors in the dialect in which was asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic_core import from_json
from starlette.exceptions import HTTPException as StarletteError
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from steerbridge.errors import SteerbridgeError
from steerbridge.serving import Cancelled
from steerbridge_serve import dialects
from steerbridge_serve.admission import Admission, Limits
from steerbridge_serve.problems import Trouble, trouble
from steerbridge_serve.service import FIRED, LOG, Service, Settings
from steerbridge_serve.worker import Worker

PAGE: Final = Path(__file__).with_name("page")


def create_app(
    worker: Worker,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    limits: Limits = Limits(),  # noqa: B008
    api_key: str = "",
    hosts: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
) -> ASGIApp:
    """The application around a worker, which is closed with it.

    Args:
        api_key, hosts, origins: see `Admission`.
    """

    @asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    # No /docs: its page loads scripts from elsewhere.
    app = FastAPI(
        title="steerbridge serve",
        version=version("steerbridge"),
        lifespan=closing,
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = StrictRoute
    service = Service(worker, settings)
    _add_errors(app)
    _add_page(app, worker)
    for dialect in dialects.DIALECTS:
        handlers = dialect.handlers(service)
        for route in dialect.routes:
            app.add_api_route(
                route.path,
                getattr(handlers, route.handler),
                methods=[route.method],
                summary=route.summary,
                tags=[dialect.name],
                response_model=None,
                responses={status: {"description": text} for status, text in STATUSES.items()},
            )
    guarded: ASGIApp = Admission(
        app, limits=limits, metrics=service.metrics, key=api_key, hosts=hosts, origins=origins
    )
    if origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[FIRED],
        )
    return guarded


class StrictRequest(Request):
    """A request whose body is read by a parser that takes no NaN, half characters or deep nests."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    """A route of the dialects."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


STATUSES: Final[dict[int | str, str]] = {
    401: "the server's API key is missing",
    403: "a host, an origin or a wish that is not allowed",
    404: "no such path or model",
    408: "the body did not come in time",
    413: "the body is too large",
    422: "a field is wrong, unknown or asks for what is not done here",
    429: "the queue is full, or this client asks too much",
    500: "the answer failed, or would not have been guarded",
    503: "the server is closing",
}


def _add_page(app: FastAPI, worker: Worker) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
    async def health() -> PlainTextResponse:
        return PlainTextResponse("", 200 if worker.alive else 503)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors()[0]).response(request.url.path)

    @app.exception_handler(SteerbridgeError)
    @app.exception_handler(Cancelled)
    async def known(request: Request, error: Exception) -> JSONResponse:
        return trouble(error).response(request.url.path)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        LOG.error("a request failed", exc_info=error)
        return trouble(error).response(request.url.path)

    @app.exception_handler(StarletteError)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        kind, text = "validation", str(error.detail)
        if error.status_code in (404, 405):
            kind, text = "not_found", dialects.unknown(request.method, request.url.path)
        headers = dict(error.headers or {})
        return Trouble(error.status_code, kind, text, headers=headers).response(request.url.path)


def _invalid(error: Any) -> Trouble:
    """The first thing that is wrong with a body."""
    places = [str(part) for part in error["loc"][1:]]
    if error["type"] == "json_invalid":
        text = f"body: expected JSON, found {error['ctx']['error']}"
        return Trouble(422, "validation", text)
    if error["type"] == "field":  # its own text names it
        places.append(error["ctx"]["field"])
        text = ".".join([*places[:-1], error["msg"]])
    else:
        text = f"{'.'.join(places) or 'body'}: {error['msg']}"
    return Trouble(422, "validation", text, ".".join(places) or None)
