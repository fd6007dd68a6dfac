"""`make bench-overhead`: what the guard costs on harmless prompts.

Plain, plain again and steered runs alternate in one process; ratios are plain over steered time
(1 means free), and the keys beside them are those of `ratios.py`. Time to first token is a
generation of one token. A runtime is left out only if its extra is not installed (TGI's server:
docs/tgi.md).
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import guards
import overhead_tgi
import overhead_tokens
import overhead_vllm
import ratios
from common import ROOT, arguments, finish, generation_times, open_smollm2, say
from steerbridge import Example, corpus_examples
from steerbridge_hf import steer

NEW, BATCH, NEW_IN_BATCH = 48, 8, 8
PARTS = ("hf", "tgi", "llama_cpp", "llama_server", "tokens", "vllm")


def main() -> None:
    parser = arguments(__doc__)
    guards.add_option(parser)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--peak", choices=["steered", "plain"], help="(internal)")
    options = parser.parse_args()
    guard = guards.chosen(options)
    prompts = [e for e in corpus_examples("test") if e.kind == "general"][: options.rounds]
    if options.peak:
        model = open_smollm2()
        if options.peak == "steered":
            steer(model.model, guard.package)
        run(model, prompts[:1], NEW)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    finish({"guard": str(guard), **measure(guard, prompts, options)})


def measure(guard: guards.Guard, prompts: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each part asked for."""
    parts: dict[str, Any] = {}
    model = open_smollm2() if {"hf", "tgi", "tokens", "vllm"} & set(options.parts) else None
    if "hf" in options.parts:
        parts["hf"] = hf(model, guard.package, prompts)
        peaks = {side: peak(guard.path, side) for side in ("plain", "steered")}
        parts["hf"]["peak_memory_ratio"] = round(peaks["steered"] / peaks["plain"], 4)
    if "tgi" in options.parts:
        parts["tgi"] = overhead_tgi.measure(model, guard.package, prompts, options.rounds)
    if "tokens" in options.parts:
        parts["hf_tokens"] = overhead_tokens.measure_hf(model, twin, options.rounds)
        if find_spec("llama_cpp"):
            measured = overhead_tokens.measure_llama_cpp(model, options.rounds)
            parts["llama_cpp_tokens"] = measured
    if "vllm" in options.parts:
        parts["vllm"] = overhead_vllm.measure(model, guard.package, options.rounds)
    if find_spec("llama_cpp"):
        import overhead_llama_cpp
        import overhead_server

        if "llama_cpp" in options.parts:
            parts["llama_cpp"] = overhead_llama_cpp.measure(guard.package, prompts)
        if "llama_server" in options.parts:
            parts["llama_server"] = overhead_server.measure(guard.package, options.rounds)
    return parts


def run(model: Any, prompts: Sequence[Example], new: int) -> float:
    """Seconds of one greedy generation of exactly `new` tokens for each prompt of a batch."""
    inputs = model._pad([model.render(prompt) for prompt in prompts])
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode():
        model.model.generate(**inputs, **options, pad_token_id=model.tokenizer.pad_token_id)
    return time.perf_counter() - start


def hf(model: Any, package: Any, prompts: Sequence[Example]) -> dict[str, Any]:
    """One prompt at a time, and eight in a batch.

    The sides are modules of their own, so that the guard is attached once, as users attach it.
    They share one copy of the weights: copies differ by a percent by where they lie in memory.
    """
    sides = {"plain": model, "control": twin(model), "steered": twin(model)}
    session = steer(sides["steered"].model, package)
    quiet = []
    for prompt in prompts:
        run(sides["steered"], [prompt], 1)
        if session.outcomes[0].fired:
            say(f"fired on a harmless prompt: {prompt.text}")
        else:
            quiet.append(prompt)
    together = quiet[:BATCH]
    batches = {
        "": (NEW, [[p] for p in quiet]),
        f"batch_{len(together)}_": (NEW_IN_BATCH, [together] * len(quiet)),
    }
    samples = {}
    for name, (new, each) in batches.items():
        rounds = []
        for i, batch in enumerate(each):
            runs = {side: partial(run, opened, batch) for side, opened in sides.items()}
            rounds.append(generation_times(i, runs, new))
        first, later = zip(*rounds, strict=True)
        samples[f"{name}ttft_ratio"] = ratios.of_rounds(first)
        samples[f"{name}decode_ratio"] = ratios.of_rounds(later)
    return {**ratios.report(samples), "rounds": len(quiet)}


def twin(model: Any) -> Any:
    """The same model as modules of its own, over the same weights."""
    shared = {id(p): p for p in model.model.parameters()}
    other = copy.copy(model)
    other.model = copy.deepcopy(model.model, shared)
    return other


def peak(package: Path, side: str) -> int:
    """Peak resident memory of a fresh process that generates once."""
    command = [sys.executable, __file__, "--guard", str(package), "--peak", side]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(output.stdout.split()[-1])


if __name__ == "__main__":
    main()
