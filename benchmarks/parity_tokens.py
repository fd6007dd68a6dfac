"""The part of `make parity` about token readings: transformers, llama.cpp and llama-server in F32.

An MLP with random weights over two layers of SmolLM2 and 16 rows reads prompts, or prompts and
answers; its rule puts a head or a sentence in. A third of the prompts have 600 to 1,900 tokens, in
several batches; the threshold is at the median, so that half of them fire. Logits of all rows of
the prompts are compared (relative above 1), then verdicts, the rows where they fired, and tokens.
A prompt is `excused` if a running score of the oracle comes closer to the threshold than TOLERANCE
before it fires, or if two logits do at some token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

import llama_server
import token_packages
from common import open_smollm2, say, share, smollm2_f32
from steerbridge import Example, SteeringPackage, corpus_examples
from steerbridge.reference import counted, window
from steerbridge.running import running_scores

NEW: Final = 24
TOLERANCE: Final = 1e-4
CONTEXT: Final = 2048


@dataclass(frozen=True)
class Answer:
    """What is compared of an answer."""

    tokens: tuple[int, ...]
    fired: bool
    row: int | None


def measure(count: int) -> dict[str, Any]:
    """The figures; `count` prompts."""
    from steerbridge_llama_cpp import open_model

    hf = open_smollm2()
    long = token_packages.long_prompts(hf.render, np.linspace(600, 1850, count // 3).astype(int))
    short = [e for e in corpus_examples("test") if len(e.text) < 300]
    prompts = [*long, *short[:: len(short) // (count - len(long))][: count - len(long)]]
    standard, packages = token_packages.moments(hf), {}
    skip = shared(prompts, hf.render)
    for name, scope, act in (
        ("prompt_head", "prompt", token_packages.head()),
        ("both_head", "both", token_packages.head()),
        ("both_say", "both", token_packages.say(hf)),
    ):
        made = token_packages.guard(hf.facts, scope, 1.0, act, standard=standard, skip=skip)
        packages[name] = at_median(hf, made, prompts)
    ours = open_model(smollm2_f32(), n_ctx=CONTEXT, type_k=0, type_v=0, flash_attn=False)
    result: dict[str, Any] = {"prompts": len(prompts), "long": len(long), "new_tokens": NEW}
    result["logits_max_diff"] = logits_diff(hf, ours, packages["both_head"], prompts)
    say(f"logits: {result['logits_max_diff']}")
    for name, package in packages.items():
        want = answers(hf.generate(prompts, package, max_new_tokens=NEW))
        near = excused(hf, package, prompts)
        got = answers(ours.generate(prompts, package, max_new_tokens=NEW))
        served = through_server(package, [hf.render(p) for p in prompts], name)
        result[name] = {
            "fired": share(a.fired for a in want),
            "excused": near,
            "llama_cpp": compared(want, got, near),
            "llama_server": compared(want, served, near),
        }
        say(f"{name}: {result[name]}")
    return result


def shared(prompts: Sequence[Example], render: Any) -> int:
    """Rows that the template puts before every prompt: with them in scope many prompts would have
    one and the same largest score."""
    rows = [render(prompt) for prompt in prompts]
    same = 0
    while len({tuple(row[: same + 1]) for row in rows}) == 1:
        same += 1
    return same


def at_median(hf: Any, package: SteeringPackage, prompts: Sequence[Example]) -> SteeringPackage:
    """The package with the threshold between the two middle scores."""
    told = hf.generate(prompts, package, max_new_tokens=NEW)
    scores = sorted(a.outcome.verdicts[0].score for a in told)
    middle = float(np.mean(scores[len(scores) // 2 - 1 : len(scores) // 2 + 1]))
    [probe] = package.spec.probes
    return package.replace(probes=(probe.replace(threshold=middle),))


def logits_diff(hf: Any, ours: Any, package: SteeringPackage, prompts: Sequence[Example]) -> float:
    """The largest difference of a row's logit, relative above 1."""
    worst = 0.0
    [probe] = package.spec.probes
    assert probe.token_reading is not None
    skip = probe.token_reading.skip
    for prompt in prompts:
        want = hf.trace(prompt, package).logits["p"][skip:]
        got = ours.trace(prompt, package).logits["p"][skip:]
        worst = max(worst, float((np.abs(want - got) / np.maximum(1, np.abs(want))).max()))
    return worst


def excused(hf: Any, package: SteeringPackage, prompts: Sequence[Example]) -> list[int]:
    """Numbers of the prompts that rounding may decide."""
    [probe] = package.spec.probes
    reading, limit = probe.token_reading, np.log(probe.threshold / (1 - probe.threshold))
    assert reading is not None
    near = []
    for i, prompt in enumerate(prompts):
        logits = hf.trace(prompt, package).logits["p"]
        rows = counted(reading, len(logits), None)
        scores = running_scores(window(reading), logits, rows, len(logits) - 1)
        crossed = np.flatnonzero(scores > limit)
        until = scores[: crossed[0] + 1] if crossed.size else scores
        if (np.abs(until[~np.isnan(until)] - limit) <= TOLERANCE * max(1, abs(limit))).any():
            near.append(i)
    return near


def answers(generations: Sequence[Any]) -> list[Answer]:
    """Of a model in this process."""
    return [
        Answer(g.tokens, g.outcome.fired, g.outcome.verdicts[0].row if g.outcome.fired else None)
        for g in generations
    ]


def through_server(
    package: SteeringPackage, prompts: Sequence[Sequence[int]], name: str
) -> list[Answer]:
    """The same from an unmodified llama-server under `steerbridge run`."""
    options = ("-np", 1, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-m", smollm2_f32())
    found = []
    with llama_server.running(f"parity-{name}", package, *options) as server:
        for prompt in prompts:
            before = len(server.events())
            told = server.complete(
                prompt, NEW, return_tokens=True, ignore_eos=False, cache_prompt=False
            )
            server.verdicts(1)
            events = [e for e in settled(server)[before:] if e["event"] in ("verdict", "answer")]
            probe = events[-1]["probes"][0]
            found.append(Answer(tuple(told["tokens"]), bool(events[-1]["fired"]), probe.get("row")))
    return found


def settled(server: Any) -> list[Any]:
    """All events, once no more come."""
    events = server.events()
    while True:
        time.sleep(0.1)
        if len(again := server.events()) == len(events):
            return again
        events = again


def compared(
    want: Sequence[Answer], got: Sequence[Answer], near: Sequence[int]
) -> Mapping[str, Any]:
    """Shares of equal verdicts, rows and tokens among the prompts that are not excused."""
    pairs = [(a, b) for i, (a, b) in enumerate(zip(want, got, strict=True)) if i not in near]
    return {
        "verdicts_equal": share(a.fired == b.fired for a, b in pairs),
        "rows_equal": share(a.row == b.row for a, b in pairs),
        "tokens_equal": share(same(a.tokens, b.tokens) for a, b in pairs),
    }


def same(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Equal but for a token that ends the turn, which a server keeps to itself."""
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter] and abs(len(a) - len(b)) <= 1
