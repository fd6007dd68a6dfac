"""SmolLM2 in llama-cpp-python, as tests of its adapter use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from helpers import add_vector, reading

CHAT = [{"role": "user", "content": "Name a colour."}]
TEXT = "The three colours of the flag are"
VECTOR = add_vector(25, alpha=60.0)
LAYER_22 = [reading("layer_input[22]")]


def new_llama(path: Path, **options: Any) -> Any:
    """A plain `Llama` with a small context."""
    import llama_cpp

    settings = {"n_ctx": 512, "verbose": False, "seed": 1, **options}
    return llama_cpp.Llama(str(path), **settings)


def tokens(llama: Any, text: str = TEXT) -> list[int]:
    return llama.tokenize(text.encode())


def answer(llama: Any, prompt: list[int], count: int = 8, **options: Any) -> list[int]:
    """`count` greedy tokens."""
    chosen = []
    for token in llama.generate(prompt, temp=0.0, **options):
        chosen.append(token)
        if len(chosen) == count:
            return chosen
    raise AssertionError("generate() does not end by itself")


def logits(llama: Any) -> np.ndarray:
    """A copy of the logits of the last evaluated row."""
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()
