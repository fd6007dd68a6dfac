"""`steerbridge serve` as its tests run it: the server, prompts for it and their answers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

import servers
from helpers import CLI, chat_message

NEW = 8  # tokens of an answer


@dataclass
class Served:
    """A running server, its prompts, and what our adapter answers to them."""

    url: str
    prompts: list[Any]
    texts: list[str]  # the prompts, rendered
    answers: list[Any]

    def chat(self, i: int, **options: Any) -> Any:
        body = {"messages": [chat_message(self.prompts[i])], "temperature": 0, "max_tokens": NEW}
        return requests.post(f"{self.url}/v1/chat/completions", json=body | options, timeout=120)


@contextlib.contextmanager
def running(folder: Path, *options: object, **environment: str) -> Iterator[str]:
    """The address of `steerbridge serve` with these options."""
    output = Path(tempfile.mkstemp(dir=folder, suffix=".txt")[1])
    with servers.running([*CLI, "serve", *options], output, environment=environment) as server:
        yield server.url
