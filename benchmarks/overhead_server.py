"""The llama-server part of `make bench-overhead`: four slots that are always busy.

A plain server and a steered one, both unmodified, run side by side and take turns: with prompts
that do not fire, and with a quarter that do (head of low rank). Ratios are steered over plain
requests a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from typing import Any

from common import alternate, say
from llama_server import RANK, Server, judged_alone, running
from steerbridge import data
from steerbridge.cli.common import smollm2
from steerbridge.package import SteeringPackage
from steerbridge_llama_cpp import open_model

NEW, SLOTS, LOAD = 48, 4, 16


def measure(package: SteeringPackage, rounds: int) -> dict[str, Any]:
    """Ratios and how they were taken; see the module's text."""
    found = [e for e in data.from_corpus("test") if e.kind in ("general", "general_harmful")]
    model = open_model(smollm2(), n_ctx=512)
    prompts = [model.render(e) for e in found]
    model.llama.close()
    with (
        running("plain", None, "-np", SLOTS) as plain,
        running("steered", package, "-np", SLOTS) as steered,
    ):
        judged = list(zip(prompts, judged_alone(steered, prompts), strict=True))
        fires, quiet = ([p for p, fired in judged if fired is side] for side in (True, False))
        say(f"llama-server: {len(fires)} prompts fire, {len(quiet)} do not")
        calm, harm = cycle(quiet), cycle(fires)
        ratios: dict[str, list[float]] = {"harmless_ratio": [], "mixed_ratio": []}
        for i in range(rounds):
            for name, share in (("harmless_ratio", 0), ("mixed_ratio", LOAD // 4)):
                load = [*islice(harm, share), *islice(calm, LOAD - share)]
                sides = {"plain": plain, "steered": steered}
                times = alternate(i, {s: partial(seconds, v, load[:]) for s, v in sides.items()})
                ratios[name].append(times["plain"] / times["steered"])
        assert not [e for e in steered.events() if e["event"] in ("refused", "failed")]
    medians = {name: round(statistics.median(r), 4) for name, r in ratios.items()}
    return {**medians, "slots": SLOTS, "requests": LOAD, "rank": RANK, "rounds": rounds}


def seconds(server: Server, load: Sequence[Sequence[int]]) -> float:
    """Until all requests of a load are answered, four at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, NEW, cache_prompt=False), load))
    return time.perf_counter() - start
