"""How well the model answers: shares of right answers on drawings never trained on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import torch
from PIL import Image

from steerbridge.errors import DataError, Problem
from steerbridge.runtime import Progress
from steerbridge_demo.drawings import UNSEEN_STYLE, Scene, draw, sample
from steerbridge_demo.questions import Question, ask, describe, stems
from steerbridge_demo.vocabulary import UNSEEN_PAIRS

SETS: Final = ("known", "unseen_pairs", "unseen_style", "unseen_stems")
_MAX_NEW: Final = 16
_BATCH: Final = 16


def question_set(name: str, count: int, seed: int) -> list[tuple[Scene, Question]]:
    """Scenes with a question each. `known`: every kind of scene, pairs, styles and stems of
    training, other drawings; the others describe single things under one new condition.

    Raises:
        DataError: no such set.
    """
    if name not in SETS:
        raise DataError(Problem("set", f"one of {SETS}", repr(name)))
    rng = random.Random(f"accuracy {name} {seed}")
    questions = []
    for _ in range(count):
        if name == "known":
            scene = sample(rng)
            questions.append((scene, ask(scene, rng)))
            continue
        limits: dict[str, Any] = {}
        if name == "unseen_pairs":
            limits["pairs"] = UNSEEN_PAIRS
        if name == "unseen_style":
            limits["styles"] = (UNSEEN_STYLE,)
        scene = sample(rng, **limits)
        split = "test" if name == "unseen_stems" else "train"
        questions.append((scene, describe(scene, rng.choice(stems("describe", split)))))
    return questions


@torch.inference_mode()
def answers(
    model: Any,
    processor: Any,
    asked: Sequence[tuple[Image.Image, str]],
    *,
    max_new_tokens: int = _MAX_NEW,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to questions about pictures."""
    said: list[str] = []
    for at in range(0, len(asked), _BATCH):
        batch = asked[at : at + _BATCH]
        inputs = inputs_for(processor, batch)
        new = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = new[:, inputs["input_ids"].shape[1] :]
        said += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        if progress:
            progress("answers", len(said), len(asked))
    return said


def inputs_for(processor: Any, asked: Sequence[tuple[Image.Image, str]]) -> Any:
    """Model inputs of questions about one picture each, left-padded."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for _, text in asked
    ]
    pictures = [[picture] for picture, _ in asked]
    return processor(
        text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
    )


def is_right(question: Question, answer: str) -> bool:
    """True if every expected word stands in the answer."""
    words = {word.strip('.,"!?:;').lower() for word in answer.split()}
    return all(word.lower() in words for word in question.expected)


def measure(
    model: Any, processor: Any, count: int, seed: int, progress: Progress | None = None
) -> dict[str, float]:
    """Share of right answers, by set and, for known drawings, by aspect."""
    rights: dict[str, list[bool]] = defaultdict(list)
    for name in SETS:
        asked = question_set(name, count, seed)
        pictures = [(draw(scene), question.text) for scene, question in asked]
        said = answers(model, processor, pictures, progress=progress)
        for (_, question), answer in zip(asked, said, strict=True):
            rights[name].append(is_right(question, answer))
            if name == "known":
                rights[f"known.{question.aspect}"].append(rights[name][-1])
    return {name: round(sum(right) / len(right), 4) for name, right in rights.items()}
