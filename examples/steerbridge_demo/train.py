"""Train the demo model: `python -m steerbridge_demo.train [--output weights.safetensors]`.

Two stages (see `alignment` and `tuning`), some 18 minutes on two cores. The same
seed, versions and number of threads give the same weights bit for bit. The last line printed is
JSON: log, times and measured accuracies of the weights as written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from steerbridge_demo import weights
from steerbridge_demo.accuracy import measure
from steerbridge_demo.alignment import (
    Aligner,
    Lessons,
    align,
    initialise,
    pool_of,
    words_right,
)
from steerbridge_demo.drawings import sample
from steerbridge_demo.model import (
    TRAINED,
    load_processor,
    load_weights,
    trained_tensors,
    untrained_model,
)
from steerbridge_demo.tuning import Settings, Tuner, teach, tune

OUTPUT = Path(__file__).resolve().parent / "data" / "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a training run."""

    seed: int = 0
    threads: int = 2
    lessons: Lessons = field(
        default_factory=lambda: Lessons(steps=2000, pictures=32, quarters=8, grey=6)
    )
    peak: float = 3e-3
    taught: int = 2
    tuning: Settings = field(default_factory=lambda: Settings(steps=80))
    measured: int = 64


PLAN = Plan()


def train(plan: Plan, output: Path, start_from: Path | None = None) -> dict[str, Any]:
    """Run both stages and write the weights; returns the log.

    `start_from` names weights to begin stage two with, and leaves stage one out.
    """
    with _deterministic(plan.threads):
        return _train(plan, output, start_from)


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    """So many threads, deterministic algorithms; what was set before comes back."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _train(plan: Plan, output: Path, start_from: Path | None) -> dict[str, Any]:
    clock = _Clock()
    model, processor = untrained_model(plan.seed), load_processor()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    log: dict[str, Any] = {"plan": asdict(plan)}
    if start_from is None:
        initialise(model, plan.seed)
        log["alignment"] = _stage_one(model, processor, plan)
        _write(output, model)
        start_from = output
    load_weights(model, start_from)  # rounded to F16, whether or not stage one ran
    log["seconds_alignment"] = clock.lap()
    tuner = Tuner(model, processor)
    taught = teach(model, processor, plan.taught, plan.seed) if plan.taught else {}
    log["tuning"] = tune(tuner, taught, plan.tuning, plan.seed, _tenths)
    log["seconds_tuning"] = clock.lap()
    tensors = _write(output, model)
    load_weights(model, output)
    log["accuracy"] = measure(model, processor, plan.measured, plan.seed, _tenths)
    log["seconds_measuring"] = clock.lap()
    log["parameters"] = sum(tensor.size for tensor in tensors.values())
    log["sha256"] = hashlib.sha256(output.read_bytes()).hexdigest()
    return log


def _write(output: Path, model: Any) -> dict[str, Any]:
    tensors = {name: tensor.numpy() for name, tensor in trained_tensors(model).items()}
    weights.write(output, tensors)
    return tensors


def _stage_one(model: Any, processor: Any, plan: Plan) -> dict[str, Any]:
    aligner = Aligner(model, processor.tokenizer)
    steps = align(
        aligner,
        plan.lessons,
        peak=plan.peak,
        seed=plan.seed,
        workers=plan.threads,
        progress=_tenths,
    )
    rng = random.Random(f"unseen drawings {plan.seed}")
    unseen = pool_of([sample(rng) for _ in range(400)])
    return {"steps": steps, "words_right": words_right(aligner, unseen)}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tenths(step: str, done: int, total: int) -> None:
    """A `Progress` that says each tenth of a step on standard error."""
    if done * 10 // total > (done - 1) * 10 // total:
        _say(f"{step} {done}/{total} {time.strftime('%H:%M:%S')}")


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return round(seconds, 1)


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the log as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m steerbridge_demo.train")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="part of what fixes the result")
    parser.add_argument("--tuning-steps", type=int, default=PLAN.tuning.steps, help="of stage two")
    parser.add_argument("--measured", type=int, default=PLAN.measured, help="questions a set")
    parser.add_argument("--start-from", type=Path, help="weights to begin stage two with")
    options = parser.parse_args(arguments)
    plan = Plan(
        seed=options.seed,
        threads=options.threads,
        tuning=Settings(steps=options.tuning_steps),
        measured=options.measured,
    )
    _say(f"training on {plan.threads} threads; weights go to {options.output}")
    log = train(plan, options.output, options.start_from)
    for row in log.get("alignment", {}).get("steps", []):
        _say(f"alignment {row}")
    for row in log["tuning"]:
        _say(f"tuning    {row}")
    print(json.dumps(log))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
