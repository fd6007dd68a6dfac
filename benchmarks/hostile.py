"""Clients that leave, and clients that mean harm: what they cost a server."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from common import ROOT, resident

sys.path.insert(0, str(ROOT / "tests"))
from servers import Running
from serving import in_process

KEY: Final = "bench"
CHAT: Final = "/v1/chat/completions"
BODY: Final = 8 << 20


@dataclass
class Client:
    """Connections of its own to a server."""

    server: Running
    opened: list[socket.socket] = field(default_factory=list)

    def send(self, body: bytes, *, of: int | None = None, key: str = KEY) -> socket.socket:
        """A connection on which a body, or a part `of` a longer one, was sent."""
        port = int(self.server.url.rpartition(":")[2])
        connection = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.opened.append(connection)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Length: {of or len(body)}\r\n\r\n"
        with contextlib.suppress(ConnectionError):  # it may be refused before all is sent
            connection.sendall(head.encode() + body)
        return connection

    def status(self, connection: socket.socket) -> int:
        """Of the answer on a connection."""
        with contextlib.suppress(ConnectionError):
            return int(connection.recv(64).split()[1])
        return 0

    def close(self) -> None:
        for connection in self.opened:
            connection.close()
        self.opened.clear()


def chat(content: Any, **options: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **options}).encode()


# ---------------------------------------------------------------- clients that leave


def abandoned(server: Running, prompts: Sequence[str], clients: int) -> dict[str, Any]:
    """So many clients leave at random moments, 32 at a time."""
    _answered(server, max(prompts, key=len) * 20)  # the memory of a long prompt is kept
    before = resident(server.pid)

    def leave(seed: int) -> None:
        rng, client = random.Random(seed), Client(server)
        body = chat(rng.choice(prompts) * rng.choice((1, 1, 20)), stream=rng.random() < 0.5)
        part = rng.choice((1.0, 1.0, 1.0, rng.random()))
        client.send(body[: int(len(body) * part)], of=len(body))
        time.sleep(rng.random() * rng.choice((0.05, 0.5, 2)))
        client.close()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(leave, range(clients)))
    start = time.monotonic()
    while _waiting(server):
        time.sleep(0.01)
    freed = time.monotonic() - start
    _answered(server)
    after = resident(server.pid)
    return {
        "clients": clients,
        "queue_free_seconds": round(freed, 2),
        "answered_seconds": round(time.monotonic() - start, 2),
        "memory_mib": [before >> 20, after >> 20],
        "memory_growth": round(after / before - 1, 4),
    }


def _waiting(server: Running) -> int:
    request = urllib.request.Request(
        f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = response.read().decode().splitlines()
    return int(float(next(x for x in lines if x.startswith("steerbridge_waiting ")).split()[1]))


def _answered(server: Running, text: str = "Hello") -> None:
    client = Client(server)
    assert client.status(client.send(chat(text, max_tokens=1))) == 200
    client.close()


# ---------------------------------------------------------------- clients that mean harm


def _picture(kind: str, mode: str, size: tuple[int, int]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _pictures(url: str, count: int = 1) -> bytes:
    return chat([{"type": "image_url", "image_url": {"url": url}}] * count)


Attack = Callable[[Client], list[int]]


def _format() -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1_000_000}
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _one(body: Callable[[], bytes]) -> Callable[[], Attack]:
    """The attack by one body, which is made before the clock runs."""

    def made() -> Attack:
        content = body()
        return lambda client: [client.status(client.send(content))]

    return made


def _half_bodies(client: Client) -> list[int]:
    """60 bodies of which a quarter comes, without a key."""
    sent = [client.send(b" " * (BODY // 4), of=BODY, key="none") for _ in range(60)]
    return [client.status(connection) for connection in sent]


def _half_bodies_with_a_key(client: Client) -> list[int]:
    """The same with a key: what cannot be held is refused, the rest waits until it is closed."""
    sent = [client.send(b" " * (BODY // 4), of=BODY) for _ in range(60)]
    for connection in sent:
        connection.settimeout(1.5)
    with ThreadPoolExecutor(60) as pool:
        return [status for status in pool.map(_quick, sent) if status]


def _quick(connection: socket.socket) -> int:
    with contextlib.suppress(OSError):
        return int(connection.recv(64).split()[1])
    return 0


def _queued(client: Client) -> list[int]:
    """20 clients with a large body queue, and leave."""
    body = chat("x " * 50_000)
    for _ in range(20):
        client.send(body)
    client.close()
    return [client.status(client.send(chat("Hello", max_tokens=1)))]


CASES: Final[dict[str, tuple[Callable[[], Attack], set[int]]]] = {
    "half_bodies": (lambda: _half_bodies, {401}),
    "half_bodies_with_a_key": (lambda: _half_bodies_with_a_key, {429}),
    "queued_and_gone": (lambda: _queued, {200}),
    "spaces": (_one(lambda: chat(" " * (BODY - 100))), {422}),
    "too_large": (_one(lambda: b" " * (2 * BODY)), {413}),
    "values": (_one(lambda: b"[" + b"[]," * (BODY // 3 - 2) + b"[]]"), {413}),
    "depth": (_one(lambda: b"[" * 190_000), {422}),
    "schema": (_one(lambda: chat("x", response_format=_format())), {422}),
    "messages": (_one(lambda: json.dumps({"messages": [{}] * 60_000}).encode()), {422}),
}
# To a server whose model takes pictures, for which a scripted one stands.
PICTURES: Final[dict[str, tuple[Callable[[], Attack], set[int]]]] = {
    "many_pictures": (_one(lambda: _pictures(_picture("PNG", "1", (64, 64)), 3_017)), {422}),
    "large_picture": (_one(lambda: _pictures(_picture("PNG", "1", (40_000, 40_000)))), {422}),
    "eps": (_one(lambda: _pictures(_picture("EPS", "RGB", (64, 64)))), {422}),
    "tiff": (_one(lambda: _pictures(_picture("TIFF", "RGB", (64, 64)))), {422}),
    "webp": (_one(lambda: _pictures(_picture("WEBP", "RGB", (2_000, 2_000)))), {200}),
}


def attacked(server: Running) -> dict[str, Any]:
    """Each case: the statuses, the seconds until the last came, and memory above idle."""
    result = _tried(server, CASES)
    with in_process(api_key=KEY) as scripted:
        result |= _tried(Running(scripted.url, os.getpid()), PICTURES)
    return result


def _tried(server: Running, cases: Any) -> dict[str, Any]:
    result = {}
    for name, (made, wanted) in cases.items():
        client, attack = Client(server), made()
        _answered(server)
        with _peak(server.pid) as peak:
            start = time.monotonic()
            statuses = set(attack(client))
            seconds = time.monotonic() - start
        client.close()
        result[name] = {
            "status": sorted(statuses),
            "right": statuses == wanted,
            "seconds": round(seconds, 2),
            "mib_above_idle": round((peak[1] - peak[0]) / 2**20, 1),
        }
    return result


@contextlib.contextmanager
def _peak(pid: int) -> Iterator[list[int]]:
    """[memory at the start, most memory since] of a process."""
    seen, done = [resident(pid)] * 2, threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            seen[1] = max(seen[1], resident(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main() -> None:
    """Against a server that runs: python benchmarks/hostile.py URL PID."""
    server = Running(sys.argv[1], int(sys.argv[2]))
    prompts = [f"How do bees make honey in {n} days?" for n in range(100)]
    print(json.dumps(abandoned(server, prompts, int(sys.argv[3]))))
    print(json.dumps(attacked(server), indent=1))


if __name__ == "__main__":
    main()
