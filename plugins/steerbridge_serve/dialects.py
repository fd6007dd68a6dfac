"""The table of dialects: every path, what is served there, and what is said where nothing is.

The routes of the application, the tables in docs/serve.md and the answers to unknown paths are
made of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from steerbridge_serve import ollama, openai, tgi
from steerbridge_serve.body import SERVER, Body

RAW: Final = "with `--raw-prompts`"


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    Attributes:
        handler: name of a method of the dialect's class.
        body: what a request holds.
    """

    method: str
    path: str
    handler: str
    summary: str
    body: type[Body] | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """What clients of one kind ask for; `handlers` is made with a `Service`."""

    name: str
    handlers: type[Any]
    routes: tuple[Route, ...]
    parts: tuple[type[Body], ...]
    """Objects inside of the bodies, whose fields are documented."""


DIALECTS: Final = (
    Dialect(
        "OpenAI",
        openai.OpenAI,
        (
            Route(
                "POST", "/v1/chat/completions", "chat", "a chat, streams too", openai.ChatCompletion
            ),
            Route(
                "POST",
                "/v1/completions",
                "complete",
                f"a raw prompt, {RAW}",
                openai.RawCompletion,
            ),
            Route(
                "POST",
                "/v1/moderations",
                "moderate",
                "verdicts without an answer",
                openai.Moderation,
            ),
            Route("GET", "/v1/models", "models", "the model"),
            Route("GET", "/v1/models/{id:path}", "model", "the model, by its name"),
        ),
        (
            openai.ChatMessage,
            openai.TextPart,
            openai.ImagePart,
            openai.ImageUrl,
            openai.ResponseFormat,
            openai.JsonSchema,
            openai.StreamOptions,
        ),
    ),
    Dialect(
        "TGI",
        tgi.TGI,
        (
            Route("POST", "/generate", "generate", f"a raw prompt, {RAW}", tgi.Generate),
            Route(
                "POST",
                "/generate_stream",
                "stream",
                f"a raw prompt, {RAW}; server-sent events",
                tgi.GenerateStream,
            ),
            Route("POST", "/", "either", f"the one or the other, {RAW}", tgi.GenerateEither),
            Route("POST", "/tokenize", "tokenize", "the tokens of a text", tgi.Tokenize),
            Route(
                "POST",
                "/chat_tokenize",
                "chat_tokenize",
                "the tokens of a chat",
                openai.ChatCompletion,
            ),
            Route("GET", "/info", "info", "the model, its limits, probes and rules"),
            Route("GET", "/metrics", "metrics", "Prometheus: requests by status, verdicts, tokens"),
        ),
        (tgi.Parameters, tgi.Grammar),
    ),
    Dialect(
        "Ollama",
        ollama.Ollama,
        (
            Route("POST", "/api/chat", "chat", "a chat, streams too", ollama.OllamaChat),
            Route(
                "POST",
                "/api/generate",
                "generate",
                f"one message; `raw` {RAW}",
                ollama.OllamaGenerate,
            ),
            Route("GET", "/api/tags", "tags", "the model"),
            Route("GET", "/api/ps", "running", "the model"),
            Route("POST", "/api/show", "show", "what is known of the model", ollama.Show),
            Route("GET", "/api/version", "version", "of Ollama's interface"),
        ),
        (ollama.OllamaMessage, ollama.Options),
    ),
)

OTHER: Final = f"use {SERVER}"
UNSERVED: Final[Mapping[str, str]] = {
    "/v1/responses": f"POST /v1/chat/completions, or {OTHER}",
    "/v1/messages": f"POST /v1/chat/completions, or {OTHER}",
    "/v1/embeddings": OTHER,
    "/v1/rerank": OTHER,
    "/v1/audio": "there is no audio here",
    "/v1/images": "there are no pictures to be made here",
    "/v1/files": "nothing is stored here",
    "/invocations": "POST /v1/chat/completions",
    "/embed": OTHER,
    "/completion": "POST /v1/chat/completions",
    "/api/embed": OTHER,
    "/api/embeddings": OTHER,
    "/api/pull": "the model is chosen when this server is started",
    "/api/push": "the model is chosen when this server is started",
    "/api/create": "the model is chosen when this server is started",
    "/api/copy": "the model is chosen when this server is started",
    "/api/delete": "the model is chosen when this server is started",
}
"""Paths that clients of the three know, and what to do instead."""


def unknown(method: str, path: str) -> str:
    """What is said where nothing is served."""
    found = [hint for start, hint in UNSERVED.items() if path.startswith(start)]
    if found:
        return f"{path}: not served here; {found[0]}"
    known = sorted(f"{route.method} {route.path}" for _, route in routes())
    return f"{method} {path[:80]}: not served here; there are {', '.join(known)}"


def routes() -> Iterator[tuple[Dialect, Route]]:
    """All routes, with their dialects."""
    for dialect in DIALECTS:
        for route in dialect.routes:
            yield dialect, route


# ---------------------------------------------------------------- documentation

HEAD: Final = """# Paths and fields of `steerbridge serve`

Generated by `make schema`; do not edit. A field that is in no column is an error (422) that names
it. A field that is refused asks for what is not done here; null, or the value in brackets, asks for
nothing.
"""


def markdown() -> str:
    """docs/dialects.md."""
    told: set[type[Body]] = set()
    lines = [HEAD, *(line for dialect in DIALECTS for line in _dialect(dialect, told))]
    lines += ["## Not served\n", "| path | what to do |", "|---|---|"]
    lines += [f"| `{path}` | {hint} |" for path, hint in UNSERVED.items()]
    return "\n".join(lines) + "\n"


def _dialect(dialect: Dialect, told: set[type[Body]]) -> Iterator[str]:
    yield f"## {dialect.name}\n"
    yield "| path | what |"
    yield "|---|---|"
    for route in dialect.routes:
        yield f"| `{route.method} {route.path}` | {route.summary} |"
    yield ""
    bodies = dict.fromkeys(route.body for route in dialect.routes if route.body)
    yield "| object | honoured | ignored | refused unless null or as given |"
    yield "|---|---|---|---|"
    for body in (*bodies, *dialect.parts):
        if body not in told:
            yield _row(body)
        told.add(body)
    yield ""


def _row(body: type[Body]) -> str:
    honoured = ", ".join(_field(name, body) for name in body.model_fields)
    ignored = ", ".join(f"`{name}`" for name in body.HARMLESS)
    refused = ", ".join(
        f"`{name}`" + (f" (`{json.dumps(refusal.idle[0])}`)" if refusal.idle else "")
        for name, refusal in body.REFUSED.items()
    )
    return f"| {body.title()} | {honoured} | {ignored} | {refused} |"


def _field(name: str, body: type[Body]) -> str:
    field = body.model_fields[name]
    note = f" ({field.description})" if field.description else ""
    return f"`{field.alias or name}`{note}"


if __name__ == "__main__":
    sys.stdout.write(markdown())
