"""The llama-server part of `make bench-overhead`: four slots that are always busy.

Two plain servers and a steered one, all unmodified, run side by side and take turns: with prompts
that do not fire, and with a quarter that do (head of low rank). Ratios are steered over plain
requests per second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ratios
from common import say
from llama_server import RANK, Server, judged_alone, running
from steerbridge import SteeringPackage, corpus_examples, smollm2
from steerbridge_llama_cpp import open_model

NEW, SLOTS, LOAD = 48, 4, 16


def measure(package: SteeringPackage, rounds: int) -> dict[str, Any]:
    """Ratios and how they were taken; see the module's docstring."""
    kinds = ("general", "general_harmful")
    model = open_model(smollm2(), n_ctx=512)
    prompts = [model.render(e) for e in corpus_examples("test") if e.kind in kinds]
    model.llama.close()
    with (
        running("plain", None, "-np", SLOTS) as plain,
        running("control", None, "-np", SLOTS) as control,
        running("steered", package, "-np", SLOTS) as steered,
    ):
        judged = list(zip(prompts, judged_alone(steered, prompts), strict=True))
        fires, quiet = ([p for p, fired in judged if fired is side] for side in (True, False))
        say(f"llama-server: {len(fires)} prompts fire, {len(quiet)} do not")
        servers = {"plain": plain, "control": control, "steered": steered}
        sides = {side: partial(seconds, server) for side, server in servers.items()}
        times = ratios.of_loads(rounds, sides, quiet, fires, LOAD)
        assert not [e for e in steered.events() if e["event"] in ("refused", "failed")]
    figures = ratios.report({name: ratios.of_rounds(each) for name, each in times.items()})
    return {**figures, "slots": SLOTS, "requests": LOAD, "rank": RANK, "rounds": rounds}


def seconds(server: Server, load: Sequence[Sequence[int]]) -> float:
    """Until all requests of a load are answered, four at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, NEW, cache_prompt=False), load))
    return time.perf_counter() - start
