"""The vLLM part of `make bench-overhead`: `vllm serve` on a CPU, F32, sixteen requests at once.

Two plain servers, a steered one and one with a peer's plugin (hotwire-vllm, which adds vectors to
the requests that ask for one, and decides nothing) run side by side and take turns: with prompts
that do not fire, and with a quarter that do, or that ask the peer for a vector. Ratios are steered
over plain requests per second.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import requests
import torch

import ratios
from common import ROOT, low_rank, say
from llama_server import RANK
from steerbridge import SteeringPackage, corpus_examples

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "conformance"))
import servers
import tgi_shard
import vllm_driver

NEW, LOAD = 48, 16
PEER = vllm_driver.ENVIRONMENT / "hotwire"
LAYER = 16  # of the peer's vector
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", LOAD),
    *("--block-size", 32, "--served-model-name", "m", "--gpu-memory-utilization", 0.2),
    "--no-enable-prefix-caching",
)


@dataclass(frozen=True)
class Server:
    """A running server; `asked`: what a request adds that is to be steered."""

    url: str
    asked: dict[str, Any] = field(default_factory=dict)

    def complete(self, prompt: Sequence[int], harmful: bool, new: int = NEW) -> Any:
        """Exactly `new` greedy tokens."""
        body = {"model": "m", "prompt": list(prompt), "max_tokens": new, "temperature": 0}
        more = self.asked if harmful else {}
        path = self.url + "/v1/completions"
        answer = requests.post(path, json={**body, "ignore_eos": True, **more}, timeout=600)
        answer.raise_for_status()
        return answer.json()

    def seconds(self, load: Sequence[tuple[Sequence[int], bool]]) -> float:
        """Until all requests of a load, asked at once, are answered."""
        start = time.perf_counter()
        with ThreadPoolExecutor(LOAD) as pool:
            list(pool.map(lambda one: self.complete(*one), load))
        return time.perf_counter() - start


def measure(model: Any, package: SteeringPackage, rounds: int) -> dict[str, Any]:
    """Ratios and how they were taken; see the module's docstring."""
    kinds = ("general", "general_harmful")
    prompts = [model.render(e) for e in corpus_examples("test") if e.kind in kinds]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        exported = tgi_shard.exported(model, folder / "model")
        guard = low_rank(package, RANK).save(folder / "guard.gguf")
        run = [sys.executable, "-m", "steerbridge.cli", "run", "--package", str(guard), "--"]
        vector = folder / "vectors" / "v.pt"
        vector.parent.mkdir()
        torch.save(torch.randn(model.facts.hidden_size), vector)
        spec = f'{{"id": "v", "layer": {LAYER}, "scale": 1.0}}'
        peer = {"PYTHONPATH": str(PEER), "HOTWIRE_VECTORS": str(vector.parent)}
        started = partial(_server, folder, exported)
        sides = {
            "plain": stack.enter_context(started("plain")),
            "control": stack.enter_context(started("control")),
            "steered": stack.enter_context(started("steered", run)),
        }
        if PEER.is_dir():
            asked = {"vllm_xargs": {"hotwire": spec}}
            sides["peer"] = stack.enter_context(started("peer", (), peer, asked))
        fired = [sides["steered"].complete(p, False, 1)["steering"]["fired"] for p in prompts]
        say(f"vLLM: {sum(fired)} of {len(fired)} prompts fire")
        judged = list(zip(prompts, fired, strict=True))
        quiet, fires = ([one for one in judged if one[1] is side] for side in (False, True))
        runs = {side: server.seconds for side, server in sides.items()}
        times = ratios.of_loads(rounds, runs, quiet, fires, LOAD)
    figures = {name: ratios.of_rounds(each) for name, each in times.items()}
    if "peer" in sides:
        figures |= {f"peer_{name}": ratios.of_rounds(each, "peer") for name, each in times.items()}
    return {**ratios.report(figures), "requests": LOAD, "rank": RANK, "rounds": rounds}


@contextmanager
def _server(
    folder: Path,
    model: Path,
    name: str,
    before: Sequence[str] = (),
    more: dict[str, str] | None = None,
    asked: dict[str, Any] | None = None,
) -> Iterator[Server]:
    command = [*before, vllm_driver.ENVIRONMENT / "bin" / "vllm", "serve", model, *OPTIONS]
    output = folder / f"{name}.txt"
    environment = {**vllm_driver.SERVED, **(more or {})}
    with servers.running(command, output, environment=environment) as running:
        yield Server(running.url, asked or {})
