"""Who is let in: checked before a byte of a body is read, and before the queue.

One layer around the application. A request passes host, origin, key, size, the limits of its
client and the queue; only then its body is read, within a time. From there until its end it is
watched whether the client is still there. However it ends, what it began is closed.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerbridge_serve.problems import Trouble
from steerbridge_serve.service import RUNS, Metrics, once

PUBLIC: Final = ("/health", "/", "/page")
"""What a browser loads before it knows a key. Only GET."""
SECURITY: Final = {
    # The page consists of its own files; text of an answer cannot load or run anything.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
DRAIN_SECONDS: Final = 0.5
CLIENTS: Final = 10_000  # whose rate is remembered


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, one client and all of them may take.

    Attributes:
        values: commas, brackets and braces of a body, of which its JSON values are made.
        waiting: requests at once, the one that is answered not counted.
        per_client: requests of one address at once; 0: any.
        rate: requests of one address in a minute; 0: any.
        held_bodies: bytes of all bodies together, in bodies of the largest size.
    """

    body_bytes: int = 8 << 20
    values: int = 200_000
    waiting: int = 64
    per_client: int = 0
    rate: int = 0
    held_bodies: int = 4
    read_seconds: float = 30
    send_seconds: float = 30


@dataclass(slots=True)
class Rate:
    """A bucket of requests for each client, filled evenly, a minute's worth at most."""

    per_minute: int
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait(self, client: str, now: float) -> float:
        """Seconds until the client may ask; 0: now, and that is counted."""
        if not self.per_minute:
            return 0.0
        left, seen = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(left + (now - seen) * self.per_minute / 60, self.per_minute)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute
        self._buckets[client] = (left - (not wait), now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return wait


class Refused(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, kind: str, text: str, **headers: str) -> None:
        self.trouble = Trouble(status, kind, text, headers=headers)


class Admission:
    """The layer.

    Args:
        key: clients must send it as a bearer token; "": no key is required.
        hosts: names by which the server is known, besides those of the loopback interface.
            "*": any IP address too.
        origins: of pages elsewhere whose scripts may ask.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        key: str = "",
        hosts: tuple[str, ...] = (),
        origins: tuple[str, ...] = (),
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key, self._hosts, self._origins = key, (*LOOPBACK, *hosts), origins
        self._rate = Rate(limits.rate)
        self._inside = 0
        self._of_client: Counter[str] = Counter()
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, self._limits.send_seconds)
        start = time.perf_counter()
        try:
            self._check(scope)
            if scope["method"] == "POST":
                await self._queued(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        except Refused as refused:
            if not answer.is_read:
                await _drain(receive)
            await refused.trouble.response(scope["path"])(scope, receive, answer)
        finally:
            self._metrics.requests.labels(answer.status).inc()
            self._metrics.seconds.observe(time.perf_counter() - start)

    # -------------------------------------------------------- checks

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", LOOPBACK[0])
        if not self._is_ours(_hostname(host)):
            raise Refused(
                403, "host", f"host: {host[:80]} is no name of this server (--allow-host)"
            )
        origin = headers.get("origin")
        if origin and origin not in self._origins and urlsplit(origin).netloc != host:
            text = f"origin: pages of {origin[:80]} may not ask (--allow-origin)"
            raise Refused(403, "origin", text)
        public = scope["method"] in ("GET", "HEAD") and (
            scope["path"] in PUBLIC or scope["path"].startswith("/page/")
        )
        if not public and not self._knows_key(headers):
            text = "expected the server's API key as bearer token"
            raise Refused(401, "authorization", text, **{"WWW-Authenticate": "Bearer"})
        if (length := headers.get("content-length", "0")) and (
            not length.isdecimal() or int(length) > self._limits.body_bytes
        ):
            raise self._too_large()

    def _is_ours(self, name: str) -> bool:
        if name in self._hosts:
            return True
        with suppress(ValueError):  # a page elsewhere comes by a name that it made point here
            return "*" in self._hosts and bool(ipaddress.ip_address(name))
        return False

    def _knows_key(self, headers: Mapping[str, str]) -> bool:
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            sent = ""
        return not self._key or hmac.compare_digest(sent.encode(), self._key.encode())

    def _too_large(self) -> Refused:
        return Refused(413, "validation", f"body: expected {self._limits.body_bytes} bytes at most")

    # -------------------------------------------------------- the queue

    async def _queued(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Take a place, and give it back when the request is over."""
        client = (scope.get("client") or ("",))[0]
        wait = self._rate.wait(client, time.monotonic())
        if wait:
            text = f"expected {self._limits.rate} requests in a minute at most"
            raise Refused(429, "overloaded", text, **{"Retry-After": str(int(wait) + 1)})
        if self._limits.per_client and self._of_client[client] >= self._limits.per_client:
            text = f"expected {self._limits.per_client} requests of one client at once at most"
            raise Refused(429, "overloaded", text, **{"Retry-After": "1"})
        if self._inside > self._limits.waiting:
            raise Refused(429, "overloaded", "the queue is full", **{"Retry-After": "1"})
        body = _Body()
        self._inside += 1
        self._of_client[client] += 1
        try:
            await self._read(receive, body, int(Headers(scope=scope).get("content-length", "0")))
            answer.is_read = True
            if sum(map(body.content.count, b",[{")) > self._limits.values:
                text = f"body: expected {self._limits.values} values at most"
                raise Refused(413, "validation", text)
            await self._answered(scope, receive, answer, body)
        except _Gone:
            answer.status = "cancelled"
        finally:
            self._inside -= 1
            self._held -= body.counted
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    async def _read(self, receive: Receive, body: _Body, length: int) -> None:
        """Read a body. It is counted as long as it says to be, before any of it is there."""
        self._hold(body, length)
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    self._hold(body, body.size + len(part) - body.counted)
                    body.add(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            text = f"body: expected all of it within {self._limits.read_seconds:.0f} seconds"
            raise Refused(408, "validation", text) from None

    def _hold(self, body: _Body, size: int) -> None:
        """Count more bytes of a body, if it is not too large and they are not too many."""
        if size <= 0:
            return
        if body.counted + size > self._limits.body_bytes:
            raise self._too_large()
        if self._held + size > self._limits.held_bodies * self._limits.body_bytes:
            text = "too much is waiting to be answered"
            raise Refused(429, "overloaded", text, **{"Retry-After": "1"})
        self._held += size
        body.grow(size)

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer, body: _Body) -> None:
        """Have the application answer while the client is there."""
        runs: list[Callable[[], None]] = []
        headers = MutableHeaders(scope=scope)
        headers["content-type"] = "application/json"  # no other kind of body is known here
        inner = {**scope, RUNS: runs}
        task = asyncio.ensure_future(self._app(inner, body.receive, answer))
        watch = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Gone
            await task
        except (_Gone, TimeoutError):  # a client that left, or that does not read
            answer.status = "cancelled"
        except Exception:
            if answer.status == "cancelled":  # else it was logged, and answered with 500
                raise
        finally:
            watch.cancel()
            once(runs)  # first: a handler may wait for an event of a job
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class _Gone(Exception):
    """The client left."""


class _Body:
    """A body in the making. It has one place: parts that came and went would leave holes."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.counted = self.size = 0
        self._is_given = False

    def grow(self, size: int) -> None:
        """Make room for more."""
        self.counted += size
        if self.content:
            self.content.extend(bytes(size))
        else:
            self.content = bytearray(size)  # pages that nobody writes take no memory

    def add(self, part: bytes) -> None:
        """Add a part, for which there is room."""
        self.content[self.size : self.size + len(part)] = part
        self.size += len(part)

    async def receive(self) -> Message:
        """See ASGI: the body as the application receives it; then nothing more comes."""
        if self._is_given:
            await asyncio.Event().wait()  # until the application's task is cancelled
        self._is_given = True
        given, self.content = self.content, bytearray()
        return {"type": "http.request", "body": given, "more_body": False}


class _Answer:
    """Sends an answer with the headers that every answer has, and remembers its status."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self.status = "cancelled"
        self.is_read = False  # the whole body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = str(message["status"])
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY.items():
                headers[name] = value
        async with asyncio.timeout(self._seconds):
            await self._send(message)


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    """Throw a body away for a moment: a client that still sends it could not read the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            message: Any = {"more_body": True}
            while message.get("more_body"):
                message = await receive()


def _hostname(host: str) -> str:
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""
