"""Scenes, prompts and processors of the demo model that several test files use."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import transformers

from steerbridge.runtime import smollm2
from steerbridge_demo import drawings
from steerbridge_demo import model as demo

# One, two and three tiles a side of the grid, upright and lying, enlarged and reduced.
SIZES = [(128, 128), (64, 64), (90, 120), (300, 200), (333, 250), (250, 100), (100, 200)]
TALL = (100, 300)  # Pillow 13 resizes it in another order than libmtmd, see `pictures`
MESSAGES = [
    [{"role": "user", "content": "Hello  there\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is ice cold?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": "<b>Another</b> {{ one }} \N{SNOWMAN}"},
    ],
]


@cache
def processor() -> Any:
    return demo.load_processor()


@cache
def plain_tokenizer() -> Any:
    """The tokenizer of SmolLM2 as shipped."""
    path = smollm2()
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def scene(size: tuple[int, int] | None = None, seed: object = 0, **limits: Any) -> drawings.Scene:
    return drawings.sample(random.Random(seed), size=size, **limits)


def prompt(text: str = "What is in the picture?") -> str:
    """A rendered prompt with one picture."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor().apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
