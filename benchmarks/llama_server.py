"""What the benchmarks of llama-server share: unmodified servers, requests and verdicts."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import CACHE, ROOT, low_rank
from steerbridge import SteeringPackage, smollm2

sys.path.insert(0, str(ROOT / "tests"))
import programs

RANK = 32


@dataclass(frozen=True)
class Server:
    """A running llama-server; `log` takes a steered one's events."""

    url: str
    log: Path
    output: Path

    def open(self, tokens: Sequence[int], new: int, **options: Any) -> Any:
        """The open response to a request for exactly `new` greedy tokens after a prompt."""
        body = {"prompt": list(tokens), "n_predict": new, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            self.url + "/completion",
            json.dumps({**body, **options}).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)

    def complete(self, tokens: Sequence[int], new: int, **options: Any) -> Any:
        """The JSON object of that response."""
        with self.open(tokens, new, **options) as answer:
            return json.load(answer)

    def events(self) -> list[Any]:
        lines = self.log.read_text("utf-8").splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def verdicts(self, count: int) -> list[Any]:
        """The events of all verdicts; waits until there are `count` of them."""
        until = time.monotonic() + 30
        while True:
            verdicts = [e for e in self.events() if e["event"] == "verdict"]
            if len(verdicts) >= count or time.monotonic() > until:
                return verdicts
            time.sleep(0.02)


@contextmanager
def running(name: str, package: SteeringPackage | None, *options: object) -> Iterator[Server]:
    """llama-server on SmolLM2 as shipped; steered by the package, its head cut to RANK."""
    folder = CACHE / "llama-server"
    folder.mkdir(parents=True, exist_ok=True)
    log, output = folder / f"{name}.jsonl", folder / f"{name}.txt"
    log.unlink(missing_ok=True)
    before: list[str] = []
    if package is not None:
        guard = low_rank(package, RANK).save(folder / "guard.gguf")
        run = [sys.executable, "-m", "steerbridge.cli", "run"]
        before = [*run, "--package", str(guard), "--log", str(log), "--"]
    command = ["-m", smollm2(), "-t", 2, "-c", 4096, "--no-webui", *options]
    with programs.llama_server(command, output, before) as url:
        yield Server(url, log, output)


def judged_alone(server: Server, prompts: Sequence[Sequence[int]], **options: object) -> list[bool]:
    """Whether each prompt (of tokens) fires, asked one at a time without a cached prefix."""
    start = len(server.verdicts(0))
    for prompt in prompts:
        server.complete(prompt, 1, cache_prompt=False, **options)
    fired = [bool(e["fired"]) for e in server.verdicts(start + len(prompts))[start:]]
    assert len(fired) == len(prompts)
    return fired
