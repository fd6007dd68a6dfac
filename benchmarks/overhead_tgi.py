"""The TGI part of `make bench-overhead`: its own Python server on a CPU, where it is installed.

Two plain shards and a steered one run side by side and decode batches of eight harmless prompts
in turn; `decode_ratio` is plain over steered seconds (null without a server). `gate_us_per_step`
is what the plugin adds to a step of eight answers of which none fired, on the simulator of the
flash classes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ratios
from common import ROOT
from steerbridge import SteeringPackage

sys.path.insert(0, str(ROOT / "tests"))
import tgi_shard

BATCH, STEPS = 8, 200


def measure(model: Any, package: SteeringPackage, prompts: Any, rounds: int) -> dict[str, Any]:
    """Ratios and how they were taken; see the module's docstring."""
    result: dict[str, Any] = {"gate_us_per_step": gate()}
    if not tgi_shard.PYTHON:
        return {**result, "decode_ratio": None}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / side for side in ("plain", "control", "steered")]
        for folder in folders:
            folder.mkdir()
        exported = tgi_shard.exported(model, Path(scratch) / "model")
        guard = package.save(Path(scratch) / "guard.gguf")
        with (
            tgi_shard.shard(exported, folders[0], None) as (plain, _),
            tgi_shard.shard(exported, folders[1], None) as (control, _),
            tgi_shard.shard(exported, folders[2], guard) as (steered, _),
        ):
            texts = [model.tokenizer.decode(model.render(p)) for p in prompts[:BATCH]]
            question = {"model": str(exported), "prompts": texts, "rounds": rounds}
            script = Path(__file__).with_name("tgi_client.py")
            times = tgi_shard.asked(script, [plain, control, steered], question)
    figures = ratios.report({"decode_ratio": ratios.of_rounds(times)})
    return {**result, **figures, "batch": BATCH, "rounds": rounds}


def gate() -> float:
    """Microseconds that a step takes longer, on a model that is nearly nothing."""
    import flash
    import helpers
    from steerbridge_hf.sites import facts
    from steerbridge_tgi.attach import attach

    sys.modules.update(flash.server_modules())
    llama = helpers.tiny("llama")
    quiet = helpers.package(facts(llama), probes=[helpers.linear_probe(threshold=1e9)])
    models = {name: flash.FlashCausalLM(llama) for name in ("plain", "steered")}
    with tempfile.TemporaryDirectory() as scratch:
        guard = str(quiet.save(Path(scratch) / "guard.gguf"))
        attach(flash.service(models["steered"]), guard)
    works = {name: answering(model) for name, model in models.items()}

    def steps(name: str) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            models[name].forward(flash.FlashCausalLMBatch(works[name]))
        return time.perf_counter() - start

    times = ratios.alternate(0, {name: partial(steps, name) for name in models})
    return round((times["steered"] - times["plain"]) / STEPS * 1e6, 1)


def answering(model: Any) -> list[Any]:
    """The work of a step of eight requests whose prompts were evaluated."""
    import flash

    requests = [
        flash.Request(i, [3, 4, 5, 6], list(range(1 + 8 * i, 9 + 8 * i))) for i in range(BATCH)
    ]
    flash.step(model, [flash.Work(r, 4) for r in requests])
    return [flash.Work(r, 1) for r in requests]
