"""The model's own answers, for probes that go on reading while it answers.

They are made once, by the model without a guard, and kept in the working directory as they come: a
run that was stopped goes on. An answer stands behind its prompt as the form `answer`, with the
prompt's label: what a harmful request led to is what such a probe has to notice.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from steerbridge.atomic import replacing
from steerbridge.data import sha256
from steerbridge.runtime import Progress, TrainableModel
from steerbridge.training.parts import Part, Parts

FORM: Final = "answer"
LENGTH: Final = 48  # tokens of an answer
CHUNK: Final = 64  # prompts that are answered before the answers are written
# Answers beside those to train on: one in so many for each of the other parts.
_OTHERS: Final = 4


def added(
    model: TrainableModel, parts: Parts, count: int, workdir: Path, progress: Progress
) -> Parts:
    """The parts with so many answered prompts to train on, and a quarter as many to search on and
    to calibrate on. An ordinary prompt to calibrate on stands in one form still: this one."""
    chosen = [
        *_drawn(parts, "train", count),
        *_drawn(parts, "search", count // _OTHERS),
        *_drawn(parts, "calibrate", count // _OTHERS),
    ]
    answers = _answers(model, parts, chosen, workdir / "answers.json", progress)
    examples, part, prompt = list(parts.examples), list(parts.part), list(parts.prompt)
    for i, answer in zip(chosen, answers, strict=True):
        answered = replace(parts.examples[i], prefill=answer, form=FORM)
        if part[i] == "calibrate" and parts.traffic[i]:
            examples[i] = answered
            continue
        examples.append(answered)
        part.append(part[i])
        prompt.append(prompt[i])
    return Parts(tuple(examples), np.array(part), np.array(prompt), (*parts.forms, FORM))


def _drawn(parts: Parts, part: Part, count: int) -> list[int]:
    """So many prompts of a part in the form `chat`, half of them harmful, evenly spaced."""
    index = [i for i in parts.of(part) if parts.examples[i].form == "chat"]
    chosen: list[int] = []
    for harmful in (True, False):
        side = [int(i) for i in index if parts.examples[i].harmful == harmful]
        side = [i for i in side if harmful or part != "calibrate" or parts.traffic[i]]
        at: NDArray[np.int64] = np.linspace(0, len(side) - 1, min(count // 2, len(side))).astype(
            int
        )
        chosen += [side[k] for k in at]
    return chosen


def _answers(
    model: TrainableModel, parts: Parts, chosen: list[int], path: Path, progress: Progress
) -> list[str]:
    """An answer to each of the prompts: those kept for these very prompts, and the others made."""
    key = sha256([parts.examples[i] for i in chosen]) + model.weights_sha256
    known: list[str] = []
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        known = kept["answers"] if kept["key"] == key else []
    path.parent.mkdir(parents=True, exist_ok=True)
    while len(known) < len(chosen):
        some = chosen[len(known) : len(known) + CHUNK]
        told = model.generate([parts.examples[i] for i in some], None, max_new_tokens=LENGTH)
        known += [answer.text for answer in told]
        with replacing(path) as fresh:
            fresh.write_text(json.dumps({"key": key, "answers": known}), "utf-8")
        progress("answers", len(known), len(chosen))
    return known
