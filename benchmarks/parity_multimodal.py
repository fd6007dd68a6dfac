"""The part of `make parity` with pictures: the demo model in transformers and through libmtmd.

Drawings of several sizes that no guard was trained on. The probe of the demo's guard, with the
threshold at the median of the scores, controls its head or a vector.
"""

from __future__ import annotations

import random
from typing import Any

from common import CACHE, demo_files, open_demo, say
from compare import at_median, compared, variants
from guards import demo_vlm_guard
from steerbridge import Example
from steerbridge_demo.drawings import draw, sample
from steerbridge_demo.questions import stems
from steerbridge_llama_cpp import open_model

SIZES = ((128, 128), (64, 64), (90, 120), (300, 200), (333, 250), (250, 100))
NEW = 24


def measure(count: int) -> dict[str, Any]:
    """Figures like those of the text model, for F32 and Q4_1 (with the F32 mmproj)."""
    hf = open_demo()
    prompts = pictures(count)
    guard = demo_vlm_guard()
    every = variants(at_median(guard.package, hf, prompts), hf)
    packages = {name: every[name] for name in ("dense", "vector")}
    want = {name: hf.generate(prompts, p, max_new_tokens=NEW) for name, p in packages.items()}
    files = demo_files()
    result: dict[str, Any] = {
        "guard": str(guard),
        "prompts": len(prompts),
        "new_tokens": NEW,
    }
    for quantisation, options in (("f32", {"type_k": 0, "type_v": 0}), ("q4_1", {})):
        model = open_model(
            files[f"text_{quantisation}"], mmproj=files["mmproj_f32"], n_ctx=512, **options
        )
        got = {name: model.generate(prompts, p, max_new_tokens=NEW) for name, p in packages.items()}
        result[quantisation] = compared(want, got)
        say(f"multimodal {quantisation}: {result[quantisation]}")
        model.llama.close()
    return result


def pictures(count: int) -> list[Example]:
    """Questions about unseen drawings, one size after the other."""
    folder = CACHE / "multimodal" / "parity"
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("parity")
    asked = (*stems("describe", "test"), *stems("make", "test"))
    examples = []
    for i in range(count):
        path = folder / f"{i}.png"
        draw(sample(rng, size=SIZES[i % len(SIZES)])).save(path)
        examples.append(Example(asked[i % len(asked)], False, images=(path,)))
    return examples
