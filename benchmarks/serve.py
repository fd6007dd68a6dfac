"""`make bench-serve`: `steerbridge serve` under load, and beside llama-cpp-python's own server.

64 clients ask at once for five minutes, harmful and harmless prompts in a random order, half of
them as streams. Every verdict is compared with that of the same prompt alone. Then the same small
load (harmless prompts, two clients) runs against both servers in turn, each with the same GGUF
file: `throughput_ratio` is ours over theirs.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, ROOT, alternate, arguments, finish, resident, say
from steerbridge import data
from steerbridge.cli.common import smollm2

sys.path.insert(0, str(ROOT / "tests"))
import servers

NEW, WAITING = 24, 32


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--package", type=Path, default=CACHE / "smollm2-guard.gguf")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    if not options.package.exists():
        sys.exit(f"no package at {options.package}: run make bench-safety or make demo first")
    kinds = ("general", "general_harmful", "pair")
    prompts = [e.text for e in data.from_corpus("test") if e.kind in kinds]
    ours = [sys.executable, "-m", "steerbridge.cli", "serve", "--package", options.package]
    ours += ["--waiting", WAITING]
    theirs = [sys.executable, "-m", "llama_cpp.server", "--model", smollm2(), "--n_ctx", 4096]
    theirs += ["--verbose", "false"]
    with running("steerbridge", ours) as server:
        url = server.url
        alone = {prompt: ask(url, prompt) for prompt in prompts}
        say(f"{sum(a['fired'] for a in alone.values())} of {len(prompts)} prompts fire")
        result = load(url, server.pid, alone, options.clients, options.seconds)
        say(str(result))
        quiet = [p for p in prompts if not alone[p]["fired"]][:16]
        with running("llama-cpp-python", theirs) as other:
            result |= compared(url, other.url, quiet, options.rounds)
    finish(result)


def running(name: str, command: Sequence[object]) -> Any:
    return servers.running(command, CACHE / f"serve-{name}.txt", ready="/v1/models")


def load(
    url: str, pid: int, alone: dict[str, dict[str, Any]], clients: int, seconds: int
) -> dict[str, Any]:
    """All clients at once, for a time; what came of it."""
    until = time.monotonic() + seconds
    prompts, counts, lock = list(alone), Counter[str](), threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            prompt = rng.choice(prompts)
            try:
                found = ask(url, prompt, stream=rng.random() < 0.5)
                kind = "right" if found["fired"] == alone[prompt]["fired"] else "wrong"
            except urllib.error.HTTPError as error:
                kind = "rejected" if error.code == 429 else "errors"
                time.sleep(0.2 + rng.random())
            except OSError:
                kind = "errors"
            with lock:
                counts[kind] += 1

    memory = []
    with ThreadPoolExecutor(clients) as pool:
        done = [pool.submit(client, seed) for seed in range(clients)]
        while not all(d.done() for d in done):
            time.sleep(seconds / 10)
            memory.append(resident(pid))
    return {
        "errors": counts["errors"],
        "wrong_verdicts": counts["wrong"],
        "rejected": counts["rejected"],
        "answered": counts["right"] + counts["wrong"],
        "clients": clients,
        "seconds": seconds,
        "memory_mib": [m >> 20 for m in memory],
        "memory_growth": round(memory[-1] / memory[1] - 1, 4),
    }


def compared(ours: str, theirs: str, prompts: Sequence[str], rounds: int) -> dict[str, Any]:
    def whole(url: str) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(ask, url), prompts))
        return time.perf_counter() - start

    ratios = []
    for i in range(rounds):
        sides = {"ours": partial(whole, ours), "theirs": partial(whole, theirs)}
        times = alternate(i, sides)
        ratios.append(times["theirs"] / times["ours"])
    return {"throughput_ratio": round(statistics.median(ratios), 4), "rounds": rounds}


def ask(url: str, prompt: str, stream: bool = False) -> dict[str, Any]:
    """The answer to a chat of one message: its text, and whether a rule fired."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": NEW,
        "stream": stream,
    }
    request = urllib.request.Request(
        url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        if not stream:
            found = json.load(answer)
            return {"fired": bool((found.get("steering") or {}).get("rules"))}
        lines = [line[6:] for line in answer if line.startswith(b"data: {")]
    return {"fired": bool(json.loads(lines[-1])["steering"]["rules"])}


if __name__ == "__main__":
    main()
