"""`steerbridge serve` as its tests run it: the server, prompts for it and their answers."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import uvicorn

import servers
from helpers import CLI, chat_message
from steerbridge.package import load
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome
from steerbridge.serving import Ended, Prompt, Token
from steerbridge_serve.app import create_app
from steerbridge_serve.cli import DEMO
from steerbridge_serve.service import Settings
from steerbridge_serve.worker import Worker

NEW = 8  # tokens of an answer


@dataclass
class Served:
    """A running server, its prompts, and what our adapter answers to them."""

    url: str
    prompts: list[Any]
    texts: list[str]  # the prompts, rendered
    answers: list[Any]
    runtime: str = "llama.cpp"

    def chat(self, i: int, **options: Any) -> Any:
        body = {"messages": [chat_message(self.prompts[i])], "temperature": 0, "max_tokens": NEW}
        return requests.post(f"{self.url}/v1/chat/completions", json=body | options, timeout=120)


@contextlib.contextmanager
def running(folder: Path, *options: object, **environment: str) -> Iterator[str]:
    """The address of `steerbridge serve` with these options."""
    output = Path(tempfile.mkstemp(dir=folder, suffix=".txt")[1])
    with servers.running([*CLI, "serve", *options], output, environment=environment) as server:
        yield server.url


class Scripted:
    """An engine without a model: it says the words `one two three ...`, and its rule fires on
    prompts with the word `harm`, then it says `No.`; `slow` prompts are evaluated until cancelled.
    """

    name, context, vision = "scripted", 100, True

    def __init__(self, package: Any = None) -> None:
        self.package = package or load(DEMO)
        self.asked: list[Any] = []
        self.cancelled = 0

    def prompt(self, question: Any) -> Prompt:
        text = _text(question)
        return Prompt(text, tuple(Token(n, w.encode()) for n, w in enumerate(text.split(" "))))

    def answer(self, question: Any, sampling: Any, emit: Any, check: Any) -> Ended:
        self.asked.append(question)
        text = _text(question)
        if "broken" in text:
            raise RuntimeError("a secret of the machine")
        try:
            while "slow" in text:
                check()
                time.sleep(0.005)
        except BaseException:
            self.cancelled += 1
            raise
        fired = "harm" in text
        verdict = Verdict("harm", 0.9 if fired else 0.1, 0.5, ">", fired)
        # A second probe that always fires, and a rule that needs both.
        both = Verdict("twins", 0.8, 0.5, ">", True)
        outcome = Outcome((verdict, both), ("refuse",) if fired else ())
        said = [b"No", b"."] if fired else [b"one", b" two", b" thr", b"ee", b" four", b" five"]
        limit = len(said) if sampling.max_new_tokens is None else sampling.max_new_tokens
        for n, word in enumerate(said[:limit]):
            if "break" in text and n == 2:
                raise RuntimeError("a secret of the machine")
            if not emit(Token(n, word, logprob=-0.5), outcome):
                return Ended("stopped", 5, outcome)
        return Ended("length" if limit < len(said) else "eos_token", 5, outcome)


def _text(question: Any) -> str:
    parts = [part.text for message in question.messages for part in message.parts]
    return " ".join([*parts, question.prompt, question.prefill]).strip()


@dataclass
class InProcess:
    """A server in a thread, with a scripted engine."""

    url: str
    port: int
    engine: Scripted
    worker: Worker

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        sent = {"data": body} if isinstance(body, bytes) else {"json": body}
        return requests.post(self.url + path, **sent, timeout=20, **options)

    def chat(self, *texts: str, **options: Any) -> requests.Response:
        """A chat of these messages, of user and assistant in turn."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        return self.post("/v1/chat/completions", {"messages": messages, **options})

    def events(self, path: str, body: Any) -> list[Any]:
        """What a stream of server-sent events brings."""
        lines = self.post(path, body).text.split("\n\n")
        texts = [line.removeprefix("data: ") for line in lines if line]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    def connect(self, sent: bytes) -> socket.socket:
        """A connection on which so much was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(sent)
        return connection

    def leaves(self, body: Any, path: str = "/v1/chat/completions") -> socket.socket:
        """A connection on which a whole request was sent, and nothing read."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        return self.connect(head.encode() + content)


@contextlib.contextmanager
def in_process(
    settings: Settings | None = None, package: Any = None, **options: Any
) -> Iterator[InProcess]:
    """A server with a scripted engine; `options` are those of `create_app`."""
    engine = Scripted(package)
    worker = Worker(engine)
    port = servers.free_port()
    app = create_app(worker, settings=settings or Settings(), **options)
    config = uvicorn.Config(
        app, port=port, log_level="critical", timeout_graceful_shutdown=1, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield InProcess(f"http://127.0.0.1:{port}", port, engine, worker)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
