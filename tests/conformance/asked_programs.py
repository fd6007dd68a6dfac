"""Unmodified programs that the kit asks: llama-server, and scripts for Python and node."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import requests

import programs
from steerbridge.errors import UnsupportedFeature
from steerbridge.testing import vision
from steerbridge.testing.driver import How
from steerbridge.testing.model import CONTEXT, Float32, TinyModel

SLOTS: Final = 8  # of a program that answers several clients
NODE: Final = "3.22.1"  # release of node-llama-cpp
_SCRIPTS: Final = Path(__file__).parent / "programs"


class ProgramFailed(Exception):
    """The program gave an error instead of an answer, or behind some tokens of one."""

    def __init__(self, reason: str, tokens: Sequence[int] = ()) -> None:
        super().__init__(reason)
        self.tokens = tuple(tokens)


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens, and the logits of the first one if the program tells them."""

    tokens: tuple[int, ...]
    logits: Float32 | None = None


class Program(Protocol):
    """A program that runs."""

    def answers(self, prompt: str, new: int, how: How, sequence: int) -> list[Answer]:
        """`how.samples` answers to a prompt.

        Raises:
            UnsupportedFeature: the program refuses by itself.
            ProgramFailed: it fails.
        """
        ...


@dataclass(frozen=True, slots=True)
class Start:
    """How a program is started.

    Args:
        before: what stands before its command: `steerbridge run ... --`, or nothing.
        mmproj: the vision tower of a model that sees.
        output: where its own messages go.
        batch: rows that it evaluates at once.
        sequences: conversations that it keeps.
    """

    before: Sequence[str]
    model: Path
    mmproj: Path | None
    draft: Path
    output: Path
    batch: int
    drafts: Literal["", "ngram", "model"] = ""
    sequences: int = 1


class LlamaServer:
    """llama-server; a sequence is a slot."""

    def __init__(self, url: str) -> None:
        self._base, self._url = url, f"{url}/completion"

    def _marker(self) -> str:
        """What stands for a picture in a prompt."""
        return str(requests.get(f"{self._base}/props", timeout=60).json()["media_marker"])

    def answers(self, prompt: str, new: int, how: How, sequence: int) -> list[Answer]:
        asked: object = TinyModel.encode(prompt)
        if shown := vision.pictures(prompt):
            text = vision.marked(prompt, self._marker())
            files = [base64.b64encode(file).decode() for file in shown]
            asked = {"prompt_string": text, "multimodal_data": files}
        body = {
            "prompt": asked,
            "n_predict": new,
            "temperature": how.temperature,
            "return_tokens": True,
            "cache_prompt": True,
            "id_slot": sequence,
        }
        if how.stream or how.cancel_after:
            return [Answer(self._streamed(body, how.cancel_after or new))]
        if how.samples > 1:
            body["n_cmpl"] = how.samples
        content = self._posted(body).json()
        replies = content if isinstance(content, list) else [content]
        return [Answer(tuple(reply["tokens"])) for reply in replies]

    def _streamed(self, body: dict[str, Any], count: int) -> tuple[int, ...]:
        """The first tokens of a stream; the connection is closed behind them."""
        tokens: list[int] = []
        with contextlib.closing(self._posted({**body, "stream": True})) as stream:
            for line in stream.iter_lines():
                if line.startswith(b"error: "):
                    raise ProgramFailed(line.decode(), tokens)
                if line.startswith(b"data: "):
                    tokens += json.loads(line[6:]).get("tokens", [])
                if len(tokens) >= count:
                    break
        return tuple(tokens)

    def _posted(self, body: dict[str, Any]) -> requests.Response:
        try:
            response = requests.post(self._url, json=body, stream="stream" in body, timeout=60)
        except requests.RequestException as error:
            raise ProgramFailed(f"no answer: {error}") from error
        if response.status_code == 200:
            return response
        reason = response.json()["error"]["message"]
        if response.status_code < 500:
            raise UnsupportedFeature("llama-server", reason)
        raise ProgramFailed(reason)


@contextmanager
def llama_server(start: Start) -> Iterator[LlamaServer]:
    options: list[object] = ["-m", start.model, "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    options += ["-t", 1, "-b", start.batch, "-ub", start.batch, "-np", SLOTS, "-c", SLOTS * CONTEXT]
    options += ["--no-webui"]
    if start.mmproj is not None:
        options += ["--mmproj", start.mmproj]
    if start.drafts == "ngram":
        options += ["--spec-type", "ngram-simple"]
        options += ["--spec-ngram-simple-size-n", 2, "--spec-ngram-simple-size-m", 4]
    if start.drafts == "model":
        options += ["-md", start.draft, "--spec-type", "draft-simple"]
        options += ["-ctkd", "f32", "-ctvd", "f32"]
    with ExitStack() as stack:
        server = programs.llama_server(options, start.output, start.before)
        try:
            url = stack.enter_context(server)
        except RuntimeError as error:
            raise ProgramFailed(str(error)) from error
        yield LlamaServer(url)


class Child:
    """A program that reads requests from its standard input and writes answers to its output."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        self._output, self._lock, self._last = output, threading.Lock(), 0
        self._replies: dict[int, queue.Queue[Mapping[str, Any]]] = {}
        with output.open("wb") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True
            )
        assert self._process.stdin
        assert self._process.stdout
        self._input, lines = self._process.stdin, self._process.stdout
        if not any('"ready"' in line for line in lines):
            raise ProgramFailed(self._ended())
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def answers(self, prompt: str, new: int, how: How, sequence: int) -> list[Answer]:
        asked: dict[str, Any] = {
            "new": new,
            "temperature": how.temperature,
            "sequence": sequence,
            "cancel_after": how.cancel_after,
        }
        if vision.pictures(prompt):
            asked["content"] = vision.content(prompt)
        else:
            asked["ids"] = TinyModel.encode(prompt)
        return [self._answer(asked)]

    def _answer(self, asked: dict[str, Any]) -> Answer:
        reply = self._ask(asked)
        if "refused" in reply:
            raise UnsupportedFeature("the program", reply["refused"])
        if "error" in reply:
            raise ProgramFailed(reply["error"], reply["tokens"])
        logits = np.array(reply["logits"], np.float32) if "logits" in reply else None
        return Answer(tuple(reply["tokens"]), logits)

    def _ask(self, asked: dict[str, Any]) -> Mapping[str, Any]:
        with self._lock:
            self._last += 1
            waiting = self._replies[self._last] = queue.Queue()
            try:
                print(json.dumps({"id": self._last, **asked}), file=self._input, flush=True)
            except OSError as error:
                raise ProgramFailed(self._ended()) from error
        try:
            return waiting.get(timeout=60)
        except queue.Empty:
            raise ProgramFailed("no answer within 60 s") from None

    def _read(self, lines: Iterator[str]) -> None:
        for line in lines:
            if line.startswith("{"):
                reply = json.loads(line)
                self._replies.pop(reply["id"]).put(reply)
        for waiting in list(self._replies.values()):
            waiting.put({"error": self._ended(), "tokens": []})

    def _ended(self) -> str:
        """What the program said before it ended."""
        code = self._process.wait(20)
        return f"exit code {code}: {self._output.read_text('utf-8', 'replace')[-2000:]}"

    def close(self) -> None:
        """End the program as it ends by itself: its input is closed."""
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(20)


def _child(start: Start, *command: str) -> AbstractContextManager[Child]:
    settings = {
        "model": str(start.model),
        "mmproj": start.mmproj and str(start.mmproj),
        "draft": str(start.draft),
        "drafts": start.drafts,
        "context": CONTEXT,
        "batch": start.batch,
        "sequences": start.sequences,
    }
    return contextlib.closing(Child([*start.before, *command, json.dumps(settings)], start.output))


def python_script(start: Start) -> AbstractContextManager[Child]:
    return _child(start, sys.executable, str(_SCRIPTS / "ask.py"))


def node_script(start: Start) -> AbstractContextManager[Child]:
    folder, node = programs.node(NODE), shutil.which("node")
    assert folder, "python tests/programs.py, and npm"
    assert node
    script = shutil.copy(_SCRIPTS / "ask.mjs", folder)  # node finds packages beside the script
    return _child(start, node, str(script))
