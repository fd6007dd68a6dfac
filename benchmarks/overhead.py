"""`make bench-overhead`: what the guard costs on harmless prompts.

Steered and unsteered runs alternate in one process; ratios are unsteered over steered time
(1 means free), medians over the rounds. Time to first token is a generation of one token. A
runtime is left out only if its extra is not installed (TGI's server: docs/tgi.md).
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import overhead_tgi
from common import CACHE, ROOT, alternate, arguments, finish, open_smollm2, say
from steerbridge import data
from steerbridge.package import load
from steerbridge_hf import steer

NEW = 48
PARTS = ("hf", "tgi", "llama_cpp", "llama_server")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--package", type=Path, default=CACHE / "smollm2-guard.gguf")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--peak", choices=["steered", "unsteered"], help="(internal)")
    options = parser.parse_args()
    if not options.package.exists():
        sys.exit(f"no package at {options.package}: run make bench-safety or make demo first")
    model = open_smollm2()
    package = load(options.package)
    prompts = [e for e in data.from_corpus("test") if e.kind == "general"][: options.rounds]
    if options.peak:
        run(model, prompts[0], NEW, package if options.peak == "steered" else None)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    result: dict[str, Any] = {}
    if "hf" in options.parts:
        result["hf"] = hf(model, package, prompts)
        peaks = {side: peak(options.package, side) for side in ("unsteered", "steered")}
        result["hf"]["peak_memory_ratio"] = round(peaks["steered"] / peaks["unsteered"], 4)
    if "tgi" in options.parts:
        result["tgi"] = overhead_tgi.measure(model, package, prompts, options.rounds)
    if find_spec("llama_cpp"):
        import overhead_llama_cpp
        import overhead_server

        if "llama_cpp" in options.parts:
            result["llama_cpp"] = overhead_llama_cpp.measure(package, prompts)
        if "llama_server" in options.parts:
            result["llama_server"] = overhead_server.measure(package, options.rounds)
    finish(result)


def run(model: Any, prompt: Any, new: int, package: Any) -> float:
    """Seconds of one greedy generation of exactly `new` tokens."""
    inputs = model._pad([model.render(prompt)])
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    session = None if package is None else steer(model.model, package)
    start = time.perf_counter()
    with torch.inference_mode():
        model.model.generate(**inputs, **options, pad_token_id=model.tokenizer.pad_token_id)
    seconds = time.perf_counter() - start
    if session is not None:
        session.remove()
        assert not session.outcomes[0].fired, f"fired on a harmless prompt: {prompt.text}"
    return seconds


def hf(model: Any, package: Any, prompts: Any) -> dict[str, float]:
    quiet = []
    for prompt in prompts:
        try:
            run(model, prompt, 1, package)
            quiet.append(prompt)
        except AssertionError as error:
            say(str(error))
    ratios: dict[str, list[float]] = {"ttft_ratio": [], "decode_ratio": []}
    for i, prompt in enumerate(quiet):
        sides = {"plain": None, "steered": package}
        first = alternate(i, {s: partial(run, model, prompt, 1, p) for s, p in sides.items()})
        whole = alternate(i, {s: partial(run, model, prompt, NEW, p) for s, p in sides.items()})
        ratios["ttft_ratio"].append(first["plain"] / first["steered"])
        decode = {s: whole[s] - first[s] for s in sides}
        ratios["decode_ratio"].append(decode["plain"] / decode["steered"])
    found = {key: round(statistics.median(values), 4) for key, values in ratios.items()}
    return {**found, "rounds": len(quiet)}


def peak(package: Path, side: str) -> int:
    """Peak resident memory of a fresh process that generates once."""
    command = [sys.executable, __file__, "--package", str(package), "--peak", side]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(output.stdout.split()[-1])


if __name__ == "__main__":
    main()
