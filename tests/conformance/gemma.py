"""Gemma 3 270M in transformers, llama.cpp and llama-server, a part of `make parity-models`.

A base model with sliding windows and without a chat template: prompts are raw. One guard is trained
on a part of the shipped prompts, then asked in all runtimes, with the weights as F32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import requests

import programs
import steerbridge
from helpers import CLI, json_lines
from steerbridge import TrainSettings
from steerbridge.datasets.groups import folds
from steerbridge.package import SteeringPackage
from steerbridge_llama_cpp.dequantise import dequantise

TRAINED: Final = 16  # one prompt of so many is trained on
ASKED: Final = 40
NEW: Final = 8
# llama.cpp's GELU is a table of F16: log-odds of a probe differ by so much, at most.
TOLERANCE: Final = 0.1


def compared(folder: Path) -> dict[str, Any]:
    """What the guard does in both, and where they differ."""
    path = programs.gemma()
    hf = steerbridge.open_model("hf", str(path))
    known = steerbridge.corpus_examples("train")
    train = [e for e, fold in zip(known, folds(known, TRAINED, 0), strict=True) if fold == 0]
    settings = TrainSettings(name="gemma-guard", search_minutes=1)
    package = steerbridge.train(hf, train, settings, workdir=folder / "states")
    others = steerbridge.corpus_examples("test")
    prompts = others[:: len(others) // ASKED][:ASKED]
    single = dequantise(path, folder / "gemma.F32.gguf")
    llama = steerbridge.open_model("llama.cpp", str(single), n_ctx=1024, type_k=0, type_v=0)
    answers = [model.generate(prompts, package, max_new_tokens=NEW) for model in (hf, llama)]
    apart, verdicts, tokens = 0.0, 0, 0
    for one, other in zip(*answers, strict=True):
        for a, b in zip(one.outcome.verdicts, other.outcome.verdicts, strict=True):
            apart = max(apart, abs(a.score - b.score))
        verdicts += one.outcome.fired != other.outcome.fired
        tokens += one.tokens != other.tokens
    served = _served(folder, single, package, [prompt.text for prompt in prompts])
    for one, (fired, new) in zip(answers[0], served, strict=True):
        verdicts += one.outcome.fired != fired
        tokens += list(one.tokens) != new
    return {
        "forms": list(package.spec.evidence.forms),
        "prompts": len(prompts),
        "fired": sum(answer.outcome.fired for answer in answers[0]),
        "scores_apart": round(apart, 5),
        "other_verdicts": verdicts,
        "other_tokens": tokens,
    }


def _served(
    folder: Path, model: Path, package: SteeringPackage, texts: Sequence[str]
) -> list[tuple[bool, list[int]]]:
    """Whether each prompt fires in llama-server, and the tokens of its answer."""
    guard, log = folder / "guard.gguf", folder / "log.jsonl"
    package.save(guard)
    run = [*CLI, "run", "--package", str(guard), "--log", str(log), "--"]
    exact = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", 2, "-c", 1024, "-np", 1)
    with programs.llama_server(
        ["-m", model, *exact, "--no-webui"], folder / "server.txt", run
    ) as url:
        options = {"temperature": 0, "n_predict": NEW, "return_tokens": True}
        answers = [
            requests.post(f"{url}/completion", json={"prompt": text, **options}, timeout=300).json()
            for text in texts
        ]
    events = [event for event in json_lines(log.read_text()) if event["event"] == "verdict"]
    fired = [bool(event["fired"]) for event in events[-len(texts) :]]  # the first: its warm-up
    return list(zip(fired, (answer["tokens"] for answer in answers), strict=True))
