"""`make bench-serve`: `steerbridge serve` under load, under attack, and beside another server.

64 clients ask at once for five minutes, harmful and harmless prompts in a random order, half of
them as streams. Every verdict is compared with that of the same prompt alone. Then 1,000 clients
leave at random moments (`abandoned`: memory before and after, seconds until the queue is free), and
each of `hostile.CASES` is tried (`hostile`: status, seconds, MiB above idle). Then the same small
load (harmless prompts, two clients) runs in turn against our server and two of llama-cpp-python's,
each with the same GGUF file: `throughput_ratio` is ours over theirs; the keys beside it are those
of `ratios.py`.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import guards
import hostile
import ratios
from common import CACHE, ROOT, arguments, finish, resident, say
from steerbridge import corpus_examples, smollm2

sys.path.insert(0, str(ROOT / "tests"))
import servers

NEW, WAITING = 24, 32


def main() -> None:
    parser = arguments(__doc__)
    guards.add_option(parser)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--leaving", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    guard = guards.chosen(options)
    kinds = ("general", "general_harmful", "pair")
    prompts = [e.text for e in corpus_examples("test") if e.kind in kinds]
    ours = [sys.executable, "-m", "steerbridge.cli", "serve", "--package", guard.path]
    ours += ["--waiting", WAITING]
    environment = {"STEERBRIDGE_API_KEY": hostile.KEY}
    theirs = [sys.executable, "-m", "llama_cpp.server", "--model", smollm2(), "--n_ctx", 4096]
    theirs += ["--verbose", "false"]
    with running("steerbridge", ours, environment) as server:
        url = server.url
        alone = {prompt: ask(url, prompt) for prompt in prompts}
        say(f"{sum(a['fired'] for a in alone.values())} of {len(prompts)} prompts fire")
        result = load(url, server.pid, alone, options.clients, options.seconds)
        say(str(result))
        result["abandoned"] = hostile.abandoned(server, prompts, options.leaving)
        say(str(result["abandoned"]))
        result["hostile"] = hostile.attacked(server)
        say(str(result["hostile"]))
        quiet = [p for p in prompts if not alone[p]["fired"]][:16]
        with running("plain", theirs) as plain, running("control", theirs) as control:
            urls = {"plain": plain.url, "control": control.url, "steered": url}
            result |= compared(urls, quiet, options.rounds)
    finish({"guard": str(guard), **result})


def running(
    name: str, command: Sequence[object], environment: Mapping[str, str] | None = None
) -> Any:
    ready = "/health" if environment else "/v1/models"
    output = CACHE / f"serve-{name}.txt"
    return servers.running(command, output, ready=ready, environment=environment)


def load(
    url: str, pid: int, alone: dict[str, dict[str, Any]], clients: int, seconds: int
) -> dict[str, Any]:
    """All clients at once, for so many seconds: answers, errors and memory."""
    until = time.monotonic() + seconds
    prompts, counts, lock = list(alone), Counter[str](), threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            prompt = rng.choice(prompts)
            try:
                answer = ask(url, prompt, stream=rng.random() < 0.5)
                kind = "right" if answer["fired"] == alone[prompt]["fired"] else "wrong"
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


def compared(urls: Mapping[str, str], prompts: Sequence[str], rounds: int) -> dict[str, Any]:
    """The ratio of the servers' times, by side."""

    def whole(url: str) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(ask, url), prompts))
        return time.perf_counter() - start

    runs = {side: partial(whole, url) for side, url in urls.items()}
    times = [ratios.alternate(i, runs) for i in range(rounds)]
    return {**ratios.report({"throughput_ratio": ratios.of_rounds(times)}), "rounds": rounds}


def ask(url: str, prompt: str, stream: bool = False) -> dict[str, Any]:
    """Whether a rule fired for a chat of one message."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": NEW,
        "stream": stream,
    }
    request = urllib.request.Request(
        url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {hostile.KEY}"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        if not stream:
            answer = json.load(response)
            return {"fired": bool((answer.get("steering") or {}).get("rules"))}
        lines = [line[6:] for line in response if line.startswith(b"data: {")]
    return {"fired": bool(json.loads(lines[-1])["steering"]["rules"])}


if __name__ == "__main__":
    main()
