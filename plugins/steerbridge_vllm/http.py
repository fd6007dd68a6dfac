"""Verdicts in the responses of vLLM's server: the field `steering`, in a stream in its last event,
and a header.

A middleware knows what the engine's outputs said while a request was answered, whatever the path:
chats, completions, responses, messages. Scores are left out unless STEERBRIDGE_SHOW_SCORES=1:
with them a prompt can be changed until it passes.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any, Final

from steerbridge import fingerprint, imports
from steerbridge.runtime import Outcome
from steerbridge_vllm import given

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Known = dict[tuple[str, int], Any]  # what was told of each answer: by request and index

HEADER: Final = b"x-steerbridge-fired"
_known: ContextVar[Known | None] = ContextVar("steerbridge", default=None)
# The event of a stream with which an answer ends, in the dialects of the server.
_LAST: Final = re.compile(
    rb'"finish_reason": ?"|"type": ?"(response\.(completed|incomplete)|message_delta)"'
)


def wrap_app(module: Any) -> None:
    """Put the middleware into the server's application, and check the template it is given."""
    original = module.build_app

    @functools.wraps(original)
    def build_app(args: Any, *more: Any, **kwargs: Any) -> Any:
        check_template(getattr(args, "chat_template", None))
        # By its name, as users give theirs: what `build_app` returns takes no more.
        args.middleware = [*args.middleware, f"{Verdicts.__module__}.{Verdicts.__name__}"]
        return original(args, *more, **kwargs)

    module.build_app = build_app


def check_template(given_template: str | None) -> None:
    """Refuse a chat template on the command line that is not the package's.

    Raises:
        ModelMismatch: it is another.
    """
    if given_template is None or "chat_template_sha256" in imports.ignored():
        return
    from vllm.entrypoints.chat_utils import load_chat_template

    text = load_chat_template(given_template)
    for package in given.packages().values():
        fingerprint.check_template(package.spec.base_model.chat_template_sha256, text)


def wrap_engine(module: Any) -> None:
    """Note what outputs say."""
    engine = module.AsyncLLM
    original = engine.generate

    @functools.wraps(original)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = _known.get()
        async for output in original(self, *args, **kwargs):
            for index, verdict in output.steering.items():
                if known is not None:
                    known[output.request_id, index] = verdict
                if output.finished:
                    count(verdict)
            yield output

    engine.generate = generate


@functools.cache
def _counters() -> tuple[Any, Any]:
    from prometheus_client import Counter

    verdicts = Counter("steerbridge_verdicts", "Verdicts on requests", ["fired"])
    return verdicts, Counter("steerbridge_rules_fired", "Rules fired", ["rule"])


def count(verdict: Any) -> None:
    """Count a verdict in the server's own metrics."""
    verdicts, rules = _counters()
    verdicts.labels(str(verdict["fired"]).lower()).inc()
    for rule in verdict["rules"]:
        rules.labels(rule).inc()


def told(known: Known) -> Any:
    """What a response says: of one answer its verdict; of several whether any fired, and each."""
    shown = os.environ.get("STEERBRIDGE_SHOW_SCORES") == "1"
    each = [
        {**Outcome.from_json(known[key]).to_json(scores=shown), "package": known[key]["package"]}
        for key in sorted(known)
    ]
    if len(each) == 1:
        return each[0]
    rules = dict.fromkeys(rule for one in each for rule in one["rules"])
    return {"fired": any(one["fired"] for one in each), "rules": list(rules), "answers": each}


class Verdicts:
    """The middleware (ASGI)."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        known: Known = {}
        before = _known.set(known)
        try:
            await self._app(scope, receive, _Response(known, send).send)
        finally:
            _known.reset(before)


class _Response:
    """A response on its way: its start is held until something is known of its answers."""

    def __init__(self, known: Known, send: Send) -> None:
        self._known, self._send = known, send
        self._start: Message | None = None
        self._kind, self._body, self._said = "", b"", False

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._start = message
            self._kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0]
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._kind == "text/event-stream":
            await self._stream(message)
        elif self._kind == "application/json":
            await self._whole(message)
        else:
            await self._begin()
            await self._send(message)

    async def _begin(self, length: int | None = None) -> None:
        """Send the start, once."""
        if self._start is None:
            return
        start, self._start = self._start, None
        if self._known:
            fired = str(told(self._known)["fired"]).lower().encode()
            kept = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
            size = [] if length is None else [(b"content-length", str(length).encode())]
            start["headers"] = [*kept, *size, (HEADER, fired)]
        await self._send(start)

    async def _whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = self._with_verdict(self._body) if self._known else self._body
        await self._begin(len(body))
        await self._send({**message, "body": body})

    def _with_verdict(self, body: bytes) -> bytes:
        try:
            content = json.loads(body)
        except ValueError:
            return body
        if not isinstance(content, dict):
            return body
        self._said = True
        return json.dumps({**content, "steering": told(self._known)}).encode()

    async def _stream(self, message: Message) -> None:
        await self._begin()
        *events, self._body = (self._body + message.get("body", b"")).split(b"\n\n")
        ended = not message.get("more_body")
        out = [self._event(event) + b"\n\n" for event in events]
        if ended:
            out.append(self._body)
            if self._known and not self._said:  # a dialect that is not known: a comment of SSE
                out.append(b": steering " + json.dumps(told(self._known)).encode() + b"\n\n")
        await self._send({**message, "body": b"".join(out)})

    def _event(self, event: bytes) -> bytes:
        if not self._known or not _LAST.search(event):
            return event
        head, data, content = event.rpartition(b"data: ")
        return head + data + self._with_verdict(content)
