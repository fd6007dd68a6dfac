"""The part of `make bench-overhead` about token readings (keys `token_*`): an MLP 1152-256-1 with
random weights over two layers of SmolLM2 and 16 rows, which never fires; and a forced answer.

`token_prefill_ratio` is of a prompt of some 500 tokens whose rows are read; `token_decode_ratio`
where rows of answers are read too, `token_prompt_decode_ratio` where they are not;
`token_say_ratio` while a sentence is said from the prompt's end on. `token_cut_microseconds` is
what a token costs more where a linear probe reads it (so almost nothing is computed), for each of
the two sites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch

import ratios
import token_packages
from common import generation_times
from ratios import alternate
from steerbridge import SteeringPackage, smollm2
from steerbridge_hf import steer as steer_hf

NEW: Final = 48
LONG: Final = 500
NEVER: Final = 1.0  # no score is above
Run = Callable[[list[int], int], float]  # seconds of so many tokens behind a prompt


def packages(model: Any) -> dict[str, SteeringPackage]:
    """What is compared with the plain model; `model` is opened in transformers."""
    facts, head = model.facts, token_packages.head()
    return {
        "prompt": token_packages.guard(facts, "prompt", NEVER, head),
        "both": token_packages.guard(facts, "both", NEVER, head),
        "cut": token_packages.guard(facts, "both", NEVER, head, hidden=0),
        "say": token_packages.guard(facts, "prompt", 0.0, token_packages.say(model)),
    }


def measure_hf(model: Any, twin: Callable[[Any], Any], rounds: int) -> dict[str, Any]:
    """In transformers; `twin` makes another model of the same weights."""
    sides: dict[str, Run] = {}
    for name, package in {"plain": None, "control": None, **packages(model)}.items():
        other = twin(model)
        if package is not None:
            steer_hf(other.model, package)
        sides[name] = partial(_hf, other)
    return _figures(model.render, sides, rounds)


def _hf(model: Any, tokens: list[int], new: int) -> float:
    ids = torch.tensor([tokens])
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode():
        model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=model.tokenizer.pad_token_id,
            **options,
        )
    return time.perf_counter() - start


def measure_llama_cpp(model: Any, rounds: int) -> dict[str, Any]:
    """In llama.cpp, on the model as shipped (Q4_1)."""
    import llama_cpp

    from overhead_llama_cpp import run
    from steerbridge_llama_cpp import steer

    sides: dict[str, Run] = {}
    for name, package in {"plain": None, "control": None, **packages(model)}.items():
        llama = llama_cpp.Llama(str(smollm2()), n_ctx=2048, verbose=False)
        if package is not None:
            steer(llama, package)
        sides[name] = partial(run, llama)
    return _figures(model.render, sides, rounds)


def _figures(render: Any, sides: Mapping[str, Run], rounds: int) -> dict[str, Any]:
    long = token_packages.long_prompts(render, [LONG] * rounds)
    short = token_packages.long_prompts(render, [40] * rounds)
    first, later = [], []
    for i in range(rounds):
        tokens = render(long[i])
        runs = {n: partial(sides[n], tokens, 1) for n in ("plain", "control", "prompt")}
        first.append(alternate(i, runs))
        tokens = render(short[i])
        later.append(generation_times(i, {n: partial(r, tokens) for n, r in sides.items()}, NEW)[1])
    report = ratios.report(
        {
            "token_prefill_ratio": ratios.of_rounds(first, "prompt"),
            "token_decode_ratio": ratios.of_rounds(later, "both"),
            "token_prompt_decode_ratio": ratios.of_rounds(later, "prompt"),
            "token_say_ratio": ratios.of_rounds(later, "say"),
        }
    )
    return {**report, "token_cut_microseconds": _cut(later), "token_rounds": rounds}


def _cut(rounds: Sequence[Mapping[str, float]]) -> float:
    """Microseconds per token and site."""
    more = [times["cut"] - times["plain"] for times in rounds]
    return round(float(np.median(more)) / (NEW - 1) / len(token_packages.LAYERS) * 1e6, 1)
