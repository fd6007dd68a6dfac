"""Captured states on disk: streamed into memory-mapped arrays, resumable.

A capture lives in a directory: `states.npy` [N, K, D] float32, the readings of every prompt;
`rows.npy` [R, S, D] float16, the rows of all prompts one behind another, at each site; and
`capture.json`, which says what was captured and how far. Running it again with the same prompts,
model, readings and sites goes on where it stopped; anything else in the way is an error, never
mixed in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import data
from steerbridge.atomic import replacing
from steerbridge.data import Example
from steerbridge.datasets.forms import CHAT
from steerbridge.errors import DataError, Problem
from steerbridge.runtime import Progress, TrainableModel
from steerbridge.spec import ImageMean, LayerInput, PromptEnd, PromptMean, Reading
from steerbridge.tensors import Float32

DEEPEST = 0.67  # of the layers
LAYERS = 12
CHUNK = 512  # prompts between two notes of progress on disk
MOST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of N prompts: `array` [R, S, D] float16; prompt i has those from `starts[i]` to
    `starts[i + 1]`."""

    array: NDArray[np.float16]
    starts: NDArray[np.int64]  # [N + 1]
    sites: tuple[LayerInput, ...]

    def lengths(self) -> NDArray[np.int64]:
        """Rows of each prompt [N]."""
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True)
class States:
    """Readings of prompts: `array` [N, K, D], one k per reading, NaN for a missing image; and
    their rows."""

    array: Float32
    readings: tuple[Reading, ...]
    rows: Rows

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
    """Some of `layer_input[1..2n/3]` at the prompt end, at an earlier boundary, and as means.

    `boundary` is an offset from the prompt end (see `turn_end`); 0 adds none. `images` adds
    the mean over image tokens. Layer 0 is the embedding of the template's last token, the same
    for every prompt. At most `LAYERS` are read, evenly spaced. The last third of the model
    decides about the next word; a pass that ends before it is a third shorter.
    """
    deepest = max(1, round(DEEPEST * num_layers))
    spaced = np.linspace(1, deepest, min(LAYERS, deepest))
    layers = sorted({round(float(layer)) for layer in spaced})
    positions: list[PromptEnd | PromptMean | ImageMean] = [PromptEnd(type="prompt_end")]
    if boundary:
        positions.append(PromptEnd(type="prompt_end", offset=boundary))
    positions.append(PromptMean(type="prompt_mean"))
    if images:
        positions.append(ImageMean(type="image_mean"))
    return tuple(
        Reading(site=LayerInput(stream="layer_input", layer=layer), position=position)
        for position in positions
        for layer in layers
    )


def turn_end(model: TrainableModel, examples: Sequence[Example]) -> int:
    """Offset from the prompt end to the first token that the template puts behind every prompt.

    That token (`<|im_end|>` in ChatML) closes the user's turn, and what the model gathered of
    the turn can be read there more sharply than behind the generation prompt. 0 without a
    template, and where a raw prompt is shorter than that: no runtime could read it there.
    """
    chats = [e for e in examples if e.form == CHAT]
    chats = [e for e in chats if not e.images] or chats
    if model.facts.chat_template_sha256 is None or not chats:
        return 0
    rows = [model.render(e) for e in chats[:: max(1, len(chats) // 64)]]
    same = 0
    while same < min(map(len, rows)) and len({row[-1 - same] for row in rows}) == 1:
        same += 1
    shortest = min((len(model.render(e)) for e in examples if e.raw), default=same)
    return -max(0, same - 1) if shortest >= same else 0


def capture(
    model: TrainableModel,
    examples: Sequence[Example],
    readings: Sequence[Reading],
    sites: Sequence[LayerInput],
    directory: Path,
    progress: Progress | None = None,
    rough: NDArray[np.bool_] | None = None,
) -> States:
    """Capture readings and rows of every example in one pass, or finish an earlier capture.

    Args:
        rough: examples whose states need not be exact [N] (see `TrainableModel.states`); None:
            there are none.

    Raises:
        DataError: the directory holds a capture of something else, or its disk is too small.
    """
    directory.mkdir(parents=True, exist_ok=True)
    note = directory / "capture.json"
    want: dict[str, Any] = {
        "prompts": data.sha256(examples),
        "model": model.facts.info().model_dump(exclude={"name"}),
        "quantisation": model.quantisation,
        "weights": model.weights_sha256,
        "readings": [str(r) for r in readings],
        "sites": [str(s) for s in sites],
    }
    if rough is None:
        rough = np.zeros(len(examples), np.bool_)
    want["rough"] = hashlib.sha256(rough.tobytes()).hexdigest()
    done = _done(note, want)
    width = model.facts.hidden_size
    lengths = [len(model.render(e)) if sites else 0 for e in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shape, of_rows = (len(examples), len(readings), width), (int(starts[-1]), len(sites), width)
    if done is None:
        _require_room(directory, 4 * int(np.prod(shape)) + 2 * int(np.prod(of_rows)))
    array = _opened(directory / "states.npy", "<f4", shape, done)
    rows = _opened(directory / "rows.npy", "<f2", of_rows, done)
    step = f"capture ({(array.nbytes + rows.nbytes) / 1e9:.1f} GB)"
    at = done or 0
    while at < len(examples):
        end = min(at + CHUNK, len(examples))
        for side in (True, False):
            index: list[int] = (at + np.flatnonzero(rough[at:end] == side)).tolist()
            some = [examples[i] for i in index]
            for captured in model.states(some, readings, sites, exact=not side):
                i = index[captured.index]
                array[i] = captured.readings
                if sites:
                    rows[starts[i] : starts[i + 1]] = np.clip(captured.rows, -MOST, MOST)
        for part in (array, rows):
            if isinstance(part, np.memmap):
                part.flush()
        at = end
        _write(note, {**want, "done": at})
        if progress:
            progress(step, at, len(examples))
    return States(array, tuple(readings), Rows(rows, starts, tuple(sites)))


def _opened(path: Path, kind: str, shape: tuple[int, ...], done: int | None) -> Any:
    """A memory-mapped array, or an ordinary one of size 0: nothing can be mapped then."""
    if not all(shape):
        return np.empty(shape, kind)
    mode = "r+" if done is not None else "w+"
    return np.lib.format.open_memmap(path, mode, np.dtype(kind), None if done else shape)


def _require_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        want = f"{size / 1e9:.1f} GB of room for captured states"
        raise DataError(Problem("disk", want, f"{free / 1e9:.1f} GB"), directory)


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
