"""Stage one, without the language model: image tokens are pulled to embeddings of words.

The four tokens of an overview stand for four words (' a', ' red', ' apple', '.'), and so do
those of a tile that shows enough of a thing; an empty tile says that it is blank. The loss is
cross-entropy over the candidate words plus the squared distance to the right one. Shapes:
N pictures, S tiles a picture (the overview last), 4 tokens a tile, D = 576.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from steerbridge.runtime import Progress
from steerbridge_demo.drawings import Scene, Thing, draw, sample
from steerbridge_demo.layout import IMAGE_TOKENS
from steerbridge_demo.model import TRAINED, pixels
from steerbridge_demo.optimisers import Optimisers
from steerbridge_demo.pictures import tiles
from steerbridge_demo.vocabulary import COLOURS, OBJECTS, article

Words = tuple[str, str, str, str]

BLANK: Final[Words] = ("a", "blank", "background", ".")
CANDIDATES: Final = ("a", "an", ".", "blank", "background", *COLOURS, *OBJECTS)
# Of a thing's square, the share in a tile from which the tile names it, and below which it counts
# as blank; between, it is left out. The overview names what is cut: parts would only mislead.
_SEEN: Final = 0.7
_GLIMPSE: Final = 0.6
_SHARPNESS: Final = 12.0  # logits are this times the cosine
_AHEAD: Final = 40  # steps whose pictures are drawn at a time: training has the cores to itself
_POSITION: Final = 0.3  # deviation of position embeddings at the start


@dataclass(frozen=True, slots=True)
class Pool:
    """Drawn pictures: `tiles` [N, 5, 64, 64, 3], `words` [N, 5, 4] (candidates; -1: left out)."""

    scenes: tuple[Scene, ...]
    tiles: NDArray[np.uint8]
    words: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lessons:
    """Stage one: `steps` steps, each on the overviews of `pictures` fresh pictures, a quarter
    of `quarters` of them, and `grey` overviews without their colours (the colour's words are
    left out): a shape is learnt apart from the colours that it was seen in."""

    steps: int
    pictures: int
    quarters: int
    grey: int


def drawn(lessons: Lessons, seed: int, workers: int) -> Iterator[Pool]:
    """The pictures of every step, drawn in `workers` processes; none comes twice."""
    draws = partial(_drawn, lessons.pictures)
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        for start in range(0, lessons.steps, _AHEAD):
            steps = range(start, min(start + _AHEAD, lessons.steps))
            yield from list(executor.map(draws, [f"{seed}:{s}" for s in steps], chunksize=4))


def _drawn(count: int, seed: str) -> Pool:
    rng = random.Random(seed)
    return pool_of([sample(rng) for _ in range(count)])


def pool_of(scenes: Sequence[Scene]) -> Pool:
    """The pool of given scenes, each of two by two tiles."""
    return Pool(
        tuple(scenes),
        np.stack([tiles(draw(scene)) for scene in scenes]),
        np.stack([scene_words(scene) for scene in scenes]),
    )


# ------------------------------------------------------------ words of a tile


def scene_words(scene: Scene) -> NDArray[np.int64]:
    """Candidate numbers [5, 4] for the tiles of a scene and its overview."""
    words_of_tiles = np.full((5, 4), -1, np.int64)
    for tile in range(4):
        words = _tile_words(scene, tile % 2, tile // 2)
        if words is not None:
            words_of_tiles[tile] = [CANDIDATES.index(w) for w in words]
    words_of_tiles[4] = [CANDIDATES.index(w) for w in _words(scene.thing)]
    return words_of_tiles


def _words(thing: Thing) -> Words:
    """Four words for a thing."""
    return (article(thing.colour), thing.colour, thing.name, ".")


def _tile_words(scene: Scene, column: int, row: int) -> Words | None:
    """The words of one tile, or None where it shows too much to be blank, too little to name."""
    share = _share(scene, scene.thing, column, row)
    if share >= _SEEN:
        return _words(scene.thing)
    return BLANK if share <= _GLIMPSE else None


def _share(scene: Scene, thing: Thing, column: int, row: int) -> float:
    """How much of the square around a thing lies in a quarter of the picture."""
    side = min(scene.width, scene.height)
    shares = []
    for centre, length, index in ((thing.x, scene.width, column), (thing.y, scene.height, row)):
        half = 0.9 * thing.size * side / length
        low, high = max(centre - half, 0.5 * index), min(centre + half, 0.5 * index + 0.5)
        shares.append(max(0.0, high - low) / (2 * half))
    return shares[0] * shares[1]


# ------------------------------------------------------------ training


class Aligner:
    """The loss of stage one for a model: distances of image tokens from word embeddings."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        ids = [_single(tokenizer, word) for word in CANDIDATES]
        table = model.get_input_embeddings().weight.detach()
        self.middle_D = table[: -len(IMAGE_TOKENS)].mean(0)
        self.words_CD = table[ids].clone()
        self.model = model

    def features(self, tiles_u8: NDArray[np.uint8]) -> Tensor:
        """Image tokens [B, 4, D] of tiles [B, 64, 64, 3]."""
        inner = self.model.model
        return inner.connector(inner.vision_model(pixels(tiles_u8)).last_hidden_state)  # type: ignore[no-any-return]

    def loss(self, features_BTD: Tensor, words: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The loss over tokens with a word ([B, 4], -1: none), and which are right [B, 4]."""
        want = torch.from_numpy(words)
        known = want >= 0
        offset = features_BTD - self.middle_D
        target = self.words_CD - self.middle_D
        logits = (
            _SHARPNESS
            * functional.normalize(offset, dim=-1)
            @ functional.normalize(target, dim=-1).T
        )
        right = logits.argmax(-1) == want
        wanted = target[want[known]]
        distance = (offset[known] - wanted).square().sum() / wanted.square().sum()
        return functional.cross_entropy(logits[known], want[known]) + distance, right


def _single(tokenizer: Any, word: str) -> int:
    ids = tokenizer.encode(word if word == "." else f" {word}", add_special_tokens=False)
    if len(ids) != 1:
        raise AssertionError(f"{word!r} is not one token")
    return int(ids[0])


def rate(step: int, steps: int, warmup: int = 60) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a half cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def initialise(model: Any, seed: int) -> None:
    """Start the tower and the connector with matrices that keep the size of what they map
    (variance 1 / inputs): the library's 0.02 is made for wide models and learns slowly here."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(TRAINED) or parameter.ndim < 2:
                continue
            deviation = _POSITION if "position" in name else parameter[0].numel() ** -0.5
            parameter.normal_(0, deviation, generator=generator)


def align(
    aligner: Aligner,
    lessons: Lessons,
    *,
    peak: float,
    seed: int,
    workers: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train tower and connector; returns a log of losses and shares of right words."""
    optimisers = Optimisers(aligner.model, peak)
    rng = np.random.default_rng(seed)
    log: list[dict[str, float]] = []
    recent: list[float] = []
    some = np.arange(lessons.quarters)
    for step, pool in enumerate(drawn(lessons, seed, workers), 1):
        quarter = rng.integers(0, 4, len(some))
        tiles, words = pool.tiles[:, 4], pool.words[:, 4]
        parts = [(tiles, words), (pool.tiles[some, quarter], pool.words[some, quarter])]
        parts.append(_without_colour(tiles[: lessons.grey], words[: lessons.grey]))
        features = aligner.features(np.concatenate([part[0] for part in parts]))
        loss, right = aligner.loss(features, np.concatenate([part[1] for part in parts]))
        optimisers.step(loss, rate(step - 1, lessons.steps))
        progress("alignment", step, lessons.steps)
        recent.append(float(right[: lessons.pictures].all(1).float().mean()))
        if step % 50 == 0 or step == lessons.steps:
            log.append(
                {
                    "step": step,
                    "loss": float(loss.detach()),
                    "right": round(float(np.mean(recent)), 4),  # of all four words, before the step
                }
            )
            recent.clear()
    return log


def _without_colour(
    tiles: NDArray[np.uint8], words: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Tiles in grey, and their words without article and colour."""
    grey = tiles.mean(-1, keepdims=True).round().astype(np.uint8)
    left = words.copy()
    left[:, :2] = -1
    return np.broadcast_to(grey, tiles.shape), left


@torch.inference_mode()
def words_right(aligner: Aligner, pool: Pool) -> float:
    """Share of the overviews of a pool whose four words are all right."""
    right = []
    for at in range(0, len(pool.tiles), 64):
        features = aligner.features(pool.tiles[at : at + 64, 4])
        right.append(aligner.loss(features, pool.words[at : at + 64, 4])[1])
    return float(torch.cat(right).all(1).float().mean())
