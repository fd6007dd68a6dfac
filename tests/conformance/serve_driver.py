"""The kit's driver for `steerbridge serve --runtime llama.cpp`, over TGI's HTTP interface."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import requests

import servers
from helpers import CLI
from steerbridge.errors import DataError, Problem, SteerbridgeError, SteeringFailed
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.testing import vision
from steerbridge.testing.driver import Ability, Files, How, Reply

CONTEXT: Final = 2048  # two batches and more


class Running:
    """A server; one model answers all requests in turn, and keeps its cache."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        if how.threads:
            with ThreadPoolExecutor(len(prompts)) as pool:
                return list(pool.map(lambda prompt: self._one(prompt, new, how), prompts))
        return [self._one(prompt, new, how) for prompt in prompts]

    def _one(self, prompt: str, new: int, how: How) -> Reply:
        parameters: dict[str, Any] = {"max_new_tokens": new, "details": True}
        if how.temperature:
            parameters |= {"do_sample": True, "temperature": how.temperature}
        if vision.pictures(prompt):
            return self._in_chat(prompt, new)
        body = {"inputs": vision.text(prompt), "parameters": parameters}
        if how.stream or how.cancel_after:
            return self._streamed(body, how.cancel_after or new)
        answer = self._posted("generate", body).json()
        tokens = tuple(token["id"] for token in answer["details"]["tokens"])
        return Reply(tokens, Outcome.from_json(answer["steering"]))

    def _in_chat(self, prompt: str, new: int) -> Reply:
        message = {"role": "user", "content": vision.content(prompt)}
        body = {"messages": [message], "max_tokens": new, "temperature": 0}
        answer = self._posted("v1/chat/completions", body).json()
        text = answer["choices"][0]["message"]["content"]
        return Reply(tuple(text.encode()), Outcome.from_json(answer["steering"]))

    def _streamed(self, body: dict[str, Any], count: int) -> Reply:
        """The first tokens of a stream; the connection is closed behind them."""
        tokens: list[int] = []
        with contextlib.closing(self._posted("generate_stream", body)) as stream:
            for line in stream.iter_lines():
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise RuntimeError(f"behind {len(tokens)} tokens: {event['error']}")
                tokens.append(event["token"]["id"])
                if len(tokens) == count:
                    break
        return Reply(tuple(tokens), Outcome.from_json(event["steering"]))

    def _posted(self, path: str, body: dict[str, Any]) -> requests.Response:
        stream = path == "generate_stream"
        response = requests.post(f"{self._url}/{path}", json=body, stream=stream, timeout=60)
        if response.status_code == 200:
            return response
        if "json" not in response.headers.get("content-type", ""):
            raise RuntimeError(f"HTTP {response.status_code}: {response.text}")
        error = response.json()
        if error["error_type"] == "validation":
            raise DataError(Problem("request", "one that serve takes", error["error"]))
        if error["error_type"] == "steering":
            raise SteeringFailed(error["error"])
        raise RuntimeError(error["error"])

    def break_hook(self) -> None:
        raise NotImplementedError


class ServeDriver:
    """`serve` as it comes: the batch of llama-cpp-python, and a KV cache in F16."""

    name = "serve"
    against = "real"
    abilities = frozenset(
        {
            Ability.CONVERSATION,
            Ability.UNENDED,
            Ability.CANCEL,
            Ability.STREAM,
            Ability.SAMPLING,
            Ability.THREADS,
            Ability.PICTURES,
            Ability.TEMPLATE,
            Ability.RESTART,
        }
    )
    batch = 512
    context = CONTEXT
    tolerance = 1e-2
    margin = 0.05
    tells_the_end = True
    kept_open = 10

    @contextmanager
    def open(self, files: Files, package: SteeringPackage | None) -> Iterator[Running]:
        command: list[object] = [*CLI, "serve", "--model", files.gguf, "--runtime", "llama.cpp"]
        command += ["--context", CONTEXT, "--raw-prompts", "--show-scores", "--hold-back", 0]
        if files.mmproj is not None:
            command += ["--mmproj", files.mmproj]
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if package is not None:
                command += ["--package", package.save(folder / "guard.gguf")]
            try:
                server = stack.enter_context(servers.running(command, folder / "serve.txt"))
            except RuntimeError as error:
                raise _refusal(str(error)) from error
            yield Running(server.url)


def _refusal(output: str) -> Exception:
    """The error with which `serve` ended instead of answering, if it was a typed one."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if last.startswith("error: "):
        return SteerbridgeError(last.removeprefix("error: "))
    return RuntimeError(output)
