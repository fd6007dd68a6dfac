"""Captured readings on disk: streamed into a memory-mapped array, resumable.

A capture lives in a directory: `states.npy` [N, K, D] float32 and `capture.json`, which says
what was captured and how far. Running it again with the same prompts, model and readings
goes on where it stopped; anything else in the way is an error, never mixed in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerbridge import data
from steerbridge.atomic import replacing
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.runtime import LoadedModel, Progress
from steerbridge.spec import ImageMean, LayerInput, PromptEnd, PromptMean, Reading
from steerbridge.tensors import Float32

CHUNK = 512  # prompts between two notes of progress on disk


@dataclass(frozen=True, slots=True)
class States:
    """Readings of prompts: `array` [N, K, D], one k per reading; NaN for a missing image."""

    array: Float32
    readings: tuple[Reading, ...]

    def of(self, readings: Sequence[Reading]) -> Float32:
        """The inputs [N, len(readings) * D] of a probe with these readings.

        Raises:
            DataError: a reading that is not finite, other than a missing image.
        """
        parts = []
        for reading in readings:
            part = self.array[:, self.readings.index(reading)]
            bad = ~np.isfinite(part).all(axis=1)
            if isinstance(reading.position, ImageMean):
                bad &= ~np.isnan(part).all(axis=1)
            if bad.any():
                row = int(bad.argmax())
                raise DataError(Problem(f"{reading} of prompt {row}", "finite numbers", "others"))
            parts.append(part)
        return np.concatenate(parts, axis=1)


def all_readings(num_layers: int, boundary: int = 0, images: bool = False) -> tuple[Reading, ...]:
    """`layer_input[1..n-1]` at the prompt end, at an earlier boundary, and as means.

    `boundary` is an offset from the prompt end (see `turn_end`); 0 adds none. `images` adds
    the mean over image tokens. Layer 0 is the embedding of the template's last token, the same
    for every prompt; the input of the final norm exists for output rows only in some runtimes.
    """
    positions: list[PromptEnd | PromptMean | ImageMean] = [PromptEnd(type="prompt_end")]
    if boundary:
        positions.append(PromptEnd(type="prompt_end", offset=boundary))
    positions.append(PromptMean(type="prompt_mean"))
    if images:
        positions.append(ImageMean(type="image_mean"))
    return tuple(
        Reading(site=LayerInput(stream="layer_input", layer=layer), position=position)
        for position in positions
        for layer in range(1, num_layers)
    )


def turn_end(model: LoadedModel, examples: Sequence[Example]) -> int:
    """Offset from the prompt end to the first token that the template puts behind every prompt.

    That token (`<|im_end|>` in ChatML) closes the user's turn, and what the model gathered of
    the turn can be read there more sharply than behind the generation prompt. 0 without a
    template.
    """
    if model.facts.chat_template_sha256 is None:
        return 0
    rows = [model.render(e) for e in examples[:: max(1, len(examples) // 64)]]
    same = 0
    while same < min(map(len, rows)) and len({row[-1 - same] for row in rows}) == 1:
        same += 1
    return -max(0, same - 1)


def capture(
    model: LoadedModel,
    examples: Sequence[Example],
    readings: Sequence[Reading],
    directory: Path,
    progress: Progress | None = None,
) -> States:
    """Capture the readings of every example, or finish an earlier capture of the same.

    Raises:
        DataError: the directory holds a capture of something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    note, path = directory / "capture.json", directory / "states.npy"
    want: dict[str, Any] = {
        "prompts": data.sha256(examples),
        "model": model.facts.info().model_dump(exclude={"name"}),
        "quantisation": model.quantisation,
        "weights": model.weights_sha256,
        "readings": [str(r) for r in readings],
    }
    done = _done(note, want)
    shape = (len(examples), len(readings), model.facts.hidden_size)
    array = np.lib.format.open_memmap(
        path, "r+" if done is not None else "w+", np.dtype("<f4"), None if done else shape
    )
    at = done or 0
    while at < len(examples):
        end = min(at + CHUNK, len(examples))
        model.capture(examples[at:end], readings, array[at:end])
        array.flush()
        at = end
        _write(note, {**want, "done": at})
        if progress:
            progress("capture", at, len(examples))
    return States(array, tuple(readings))


def _done(note: Path, want: dict[str, Any]) -> int | None:
    """How many prompts an earlier run captured; None if there was none."""
    if not note.is_file():
        return None
    earlier = json.loads(note.read_text())
    done = int(earlier.pop("done"))
    if earlier != want:
        differs = sorted(key for key in want if earlier.get(key) != want[key])
        raise DataError(
            Problem("capture", "one of these prompts, model and readings", f"other {differs}"),
            note,
        )
    return done


def _write(note: Path, content: dict[str, Any]) -> None:
    with replacing(note) as fresh:
        fresh.write_text(json.dumps(content, indent=2))
