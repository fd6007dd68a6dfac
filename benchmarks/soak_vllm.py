"""`make soak-vllm`: two thousand requests to vLLM's engine on a CPU, in vLLM's own Python.

The model is the tiny one of the conformance kit. Requests come at random, most of them behind the
beginning of another; a tenth is given up on the way. The KV cache has room for a part of them, so
answers are preempted and evaluated again. Every verdict, and the tokens of every whole answer, are
compared with the kit's oracle in numpy. When all have ended, nothing may be known of any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from steerbridge.testing import Ground, TinyModel
from steerbridge.testing import cases as kit
from steerbridge.testing.cases import Case

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "conformance"))
import vllm_driver

HEAD: Final = 32  # vLLM has no code for narrower ones on a CPU
BLOCKS, AT_ONCE = 16, 12
LONGEST: Final = 120  # tokens of a prompt
NEW: Final = (1, 4, 40)  # of an answer
COUNTED: Final = ("right", "wrong", "fired", "given up", "preempted")
Options = dict[str, Any]
NGRAM: Final = {
    "method": "ngram",
    "num_speculative_tokens": 2,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
# A package for the tiny model, and how the engine is opened for it.
PARTS: Final[dict[str, tuple[Callable[[TinyModel], Case], Options]]] = {
    "means": (lambda model: kit.standard(model)["mean"], {}),
    "rows of answers, guesses": (
        lambda model: kit.case(model, [kit.of_rows(kit.linear(), window=2)], seed=21),
        {"speculative_config": NGRAM},
    ),
    "layers": (lambda model: kit.standard(model)["both"], {"enable_prefix_caching": False}),
}


def main() -> int:
    """Soak every part; 1 if an answer was wrong or something stayed known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=700, help="of each part")
    parser.add_argument("--part", choices=PARTS, help="(internal)")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(soaked(options.part, options.requests)))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (make, _) in PARTS.items():
            guard = make(TinyModel(head=HEAD)).package.save(Path(scratch) / "guard.gguf")
            command = [sys.executable, __file__, "--part", name]
            done = subprocess.run(
                [*command, "--requests", str(options.requests)],
                env={**os.environ, **vllm_driver.SETTINGS, "STEERBRIDGE_PACKAGE": str(guard)},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, found[name], file=sys.stderr, flush=True)
    wrong = sum(part["wrong"] + part["known_at_the_end"] for part in found.values())
    print(json.dumps({**found, "wrong": wrong}))
    return int(wrong > 0)


class Soak:
    """One engine and the requests that are on their way."""

    def __init__(self, engine: Any, case: Case, prompts: list[list[str]]) -> None:
        self._engine, self._case, self._prompts = engine, case, prompts
        self._rng = random.Random(0)
        self._live: dict[str, tuple[str, int, int]] = {}  # prompt, tokens wanted, given up after
        self.counts: Counter[str] = Counter()

    def run(self, count: int) -> None:
        """So many requests, one after another and side by side."""
        asked = 0
        while asked < count or self._live:
            while asked < count and len(self._live) < AT_ONCE and self._rng.random() < 0.6:
                self._ask(f"{asked}")
                asked += 1
            for output in self._engine.step():
                self._take(output)

    def _ask(self, name: str) -> None:
        from vllm import SamplingParams, TokensPrompt

        prompt, new = self._rng.choice(self._rng.choice(self._prompts)), self._rng.choice(NEW)
        given_up = self._rng.randrange(1, new) if new > 1 and self._rng.random() < 0.1 else 0
        self._live[name] = prompt, new, given_up
        ids = self._case.model.encode(prompt)
        params = SamplingParams(temperature=0.0, max_tokens=new, detokenize=False)
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=ids), params)

    def _take(self, output: Any) -> None:
        name = output.request_id
        if name not in self._live:
            return
        prompt, new, given_up = self._live[name]
        tokens = tuple(output.outputs[0].token_ids)
        if given_up and len(tokens) >= given_up:
            self._engine.abort_request([name])
            self.counts["given up"] += 1
            del self._live[name]
        elif output.finished:
            del self._live[name]
            expected = self._case.expected(prompt, new)
            told = output.steering.get(0)
            assert expected.outcome is not None
            rules = [*expected.outcome.rules]
            right = told is not None and told["rules"] == rules and tokens == expected.tokens
            self.counts["right" if right else "wrong"] += 1
            self.counts["fired"] += bool(rules)
            if not right:
                print(f"{prompt!r}: {told} {tokens}, expected {expected}", file=sys.stderr)


def prompts_of(case: Case) -> list[list[str]]:
    """Prompts that fire and quiet ones, most with a long beginning of another. Rounding cannot
    change the right answer of any."""
    rng = random.Random(1)
    known = [*case.fired, *case.quiet]
    stems = ["".join(rng.choices(known, k=8))[:LONGEST] for _ in range(6)]
    drawn = [rng.choice(stems)[: rng.randrange(LONGEST)] + rng.choice(known) for _ in range(400)]
    sound = [p for p in [*known, *drawn] if all(case.sound(p, new) for new in NEW)]
    return [[p for p in dict.fromkeys(sound) if case.holds(p) is side] for side in (True, False)]


def soaked(name: str, count: int) -> dict[str, Any]:
    """The counts of one part."""
    from vllm import LLM

    make, more = PARTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        ground = Ground(Path(scratch), head=HEAD)
        case = make(ground.model)
        llm = LLM(
            model=str(ground.files.transformers),
            dtype="float32",
            async_scheduling=False,
            gpu_memory_utilization=0.3,
            disable_log_stats=True,
            enforce_eager=True,
            max_model_len=256,
            max_num_batched_tokens=vllm_driver.ROWS,
            max_num_seqs=AT_ONCE,
            block_size=vllm_driver.BLOCK,
            num_gpu_blocks_override=BLOCKS,
            **more,
        )
    core = llm.llm_engine.engine_core.engine_core
    soak = Soak(llm.llm_engine, case, prompts_of(case))
    preempt = core.scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        soak.counts["preempted"] += 1
        return preempt(*args, **kwargs)

    core.scheduler._preempt_request = counted
    start = time.monotonic()
    soak.run(count)
    seconds = time.monotonic() - start
    llm.llm_engine.step()  # says what ended last
    worker = llm.llm_engine.model_executor.driver_worker.worker
    return {
        **{
            kind: soak.counts[kind] for kind in ("right", "wrong", "fired", "given up", "preempted")
        },
        "known_at_the_end": worker.steerbridge.live + len(core.scheduler._steering),
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
