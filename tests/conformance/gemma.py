"""Gemma 3 270M in transformers and in llama.cpp, a part of `make parity-models`.

A base model with sliding windows and without a chat template: prompts are raw. One guard is trained
on a part of the shipped prompts, then asked in both runtimes, with the weights as F32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import programs
import steerbridge
from steerbridge import TrainSettings
from steerbridge.datasets.groups import folds
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
    return {
        "forms": list(package.spec.evidence.forms),
        "prompts": len(prompts),
        "fired": sum(answer.outcome.fired for answer in answers[0]),
        "scores_apart": round(apart, 5),
        "other_verdicts": verdicts,
        "other_tokens": tokens,
    }
