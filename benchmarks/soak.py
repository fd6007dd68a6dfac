"""`make soak`: thousands of requests to an unmodified llama-server under `steerbridge run`.

Four clients, each with a slot of its own: prompts that share prefixes or repeat, answers of random
length, streams closed by the client. Every verdict is compared with that of the same prompt alone
on an idle server; resident memory is read after each fifth of the run.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import guards
from common import arguments, finish, resident, say, share
from llama_server import Server, judged_alone, running
from steerbridge import Example, corpus_examples, smollm2
from steerbridge_llama_cpp import open_model

SLOTS, FIFTHS = 4, 5


def main() -> None:
    parser = arguments(__doc__)
    guards.add_option(parser)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    guard = guards.chosen(options)
    prompts = rendered()
    with running("soak", guard.package, "-np", SLOTS) as server:
        alone = judged_alone(server, prompts, id_slot=0)
        before = len(server.verdicts(0))
        memory = [memory_of(server)]
        jobs = [plan(slot, len(prompts), options.requests // SLOTS) for slot in range(SLOTS)]
        done = 0
        for fifth in range(FIFTHS):
            parts = [part(job, fifth) for job in jobs]
            with ThreadPoolExecutor(SLOTS) as pool:
                list(pool.map(partial(work, server, prompts), range(SLOTS), parts))
            done += sum(map(len, parts))
            say(f"{done} requests, {memory_of(server) >> 20} MiB resident")
            memory.append(memory_of(server))
        told = server.verdicts(before + done)[before:]
        troubles = [e for e in server.events() if e["event"] in ("refused", "failed", "stopped")]
    wrong = 0
    for slot, job in enumerate(jobs):
        got = [bool(e["fired"]) for e in told if e["sequence"] == slot]
        want = [alone[prompt] for prompt, *_ in job]
        wrong += sum(a != b for a, b in zip(got, want, strict=False)) + abs(len(got) - len(want))
    finish(
        {
            "guard": str(guard),
            "requests": done,
            "wrong_verdicts": wrong,
            "fired": share(bool(e["fired"]) for e in told),
            "refused_or_failed": len(troubles),
            "memory_mib": [m >> 20 for m in memory],
            "memory_growth": round(memory[-1] / memory[1] - 1, 4),
        }
    )


def rendered() -> list[list[int]]:
    """Chats as tokens: test prompts of every kind, alone and as the second turn of another."""
    examples = [e for e in corpus_examples("test") if e.kind in ("pair", "general")][:60]
    model = open_model(smollm2(), n_ctx=1024)
    alone = [model.render(e) for e in examples]
    first = examples[1]
    start = model.render(Example(first.text, False))
    later = [[*start, *model.llama.tokenize(b"Well.", add_bos=False), *p] for p in alone[:20]]
    model.llama.close()
    return [*alone, *later]


def plan(slot: int, prompts: int, count: int) -> list[tuple[int, int, bool]]:
    """(prompt, tokens to generate, whether the client leaves early) of one client."""
    rng = random.Random(slot)
    chosen: list[tuple[int, int, bool]] = []
    for _ in range(count):
        again = chosen and rng.random() < 0.2
        prompt = chosen[-1][0] if again else rng.randrange(prompts)
        chosen.append((prompt, rng.randint(1, 32), rng.random() < 0.15))
    return chosen


def part(job: Sequence[Any], fifth: int) -> Sequence[Any]:
    size = len(job) / FIFTHS
    return job[round(fifth * size) : round((fifth + 1) * size)]


def work(
    server: Server,
    prompts: Sequence[Sequence[int]],
    slot: int,
    job: Sequence[tuple[int, int, bool]],
) -> None:
    for prompt, new, leaves in job:
        if leaves:
            leave(server, prompts[prompt], slot)
        else:
            server.complete(prompts[prompt], new, id_slot=slot)


def leave(server: Server, prompt: Sequence[int], slot: int) -> None:
    """Take the first tokens of a stream and close it."""
    with server.open(prompt, 200, stream=True, id_slot=slot) as stream:
        for _ in range(4):
            stream.readline()


def memory_of(server: Server) -> int:
    """Bytes of the server's process, which the log names."""
    time.sleep(0.5)
    [active] = [e for e in server.events() if e["event"] == "active"]
    return resident(active["pid"])


if __name__ == "__main__":
    main()
