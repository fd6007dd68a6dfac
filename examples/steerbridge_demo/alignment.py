"""Stage one, without the language model: image tokens are pulled to embeddings of words.

The four tokens of an overview stand for four words (' a', ' red', ' apple', '.'), and so do
those of a tile that shows enough of a thing; an empty tile says that it is blank. The loss is
cross-entropy over the candidate words plus the squared distance to the right one. Shapes:
N pictures, S tiles a picture (the overview last), 4 tokens a tile, D = 576.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
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

MIX: Final = {"one": 0.75, "two": 0.25}
BLANK: Final[Words] = ("a", "blank", "background", ".")
CANDIDATES: Final = ("a", "an", ".", "blank", "background", *COLOURS, *OBJECTS)
_SEEN: Final = 0.35  # share of a thing's square in a tile from which the tile names it
_GLIMPSE: Final = 0.08  # below this share the tile counts as blank; between, it is left out
_SHARPNESS: Final = 12.0  # logits are this times the cosine
_CHUNK: Final = 250
_POSITION: Final = 0.3  # deviation of position embeddings at the start


@dataclass(frozen=True, slots=True)
class Pool:
    """Drawn pictures: `tiles` [N, 5, 64, 64, 3], `words` [N, 5, 4] (candidates; -1: left out)."""

    scenes: tuple[Scene, ...]
    tiles: NDArray[np.uint8]
    words: NDArray[np.int64]


def random_scene(rng: random.Random, **limits: Any) -> Scene:
    """A scene of a kind drawn from `MIX`."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    return sample(rng, kind, **limits)


def make_pool(count: int, kind: str | None, seed: int, workers: int, progress: Progress) -> Pool:
    """Draw `count` pictures (rounded up to whole chunks) of a kind (None: as in `MIX`) in
    `workers` processes."""
    chunks = -(-count // _CHUNK)
    parts: list[Pool] = []
    draws = partial(_drawn, kind)
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        for part in executor.map(draws, [f"{kind}:{seed}:{i}" for i in range(chunks)]):
            parts.append(part)
            progress(len(parts), chunks)
    return Pool(
        tuple(scene for part in parts for scene in part.scenes),
        np.concatenate([part.tiles for part in parts]),
        np.concatenate([part.words for part in parts]),
    )


def _drawn(kind: str | None, seed: str) -> Pool:
    rng = random.Random(seed)
    return pool_of([sample(rng, kind) if kind else random_scene(rng) for _ in range(_CHUNK)])


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
    found = np.full((5, 4), -1, np.int64)
    for tile in range(4):
        words = _tile_words(scene, tile % 2, tile // 2)
        if words is not None:
            found[tile] = [CANDIDATES.index(w) for w in words]
    found[4] = [CANDIDATES.index(w) for w in _words(scene.things)]
    return found


def _words(things: Sequence[Thing]) -> Words:
    """Four words for what is visible."""
    if not things:
        return BLANK
    first = things[0]
    if len(things) == 1:
        return (article(first.colour), first.colour, first.name, ".")
    return (first.colour, first.name, things[1].colour, things[1].name)


def _tile_words(scene: Scene, column: int, row: int) -> Words | None:
    """The words of one tile, or None where it shows too much to be blank, too little to name."""
    shares = [_share(scene, thing, column, row) for thing in scene.things]
    if any(_GLIMPSE < share < _SEEN for share in shares):
        return None
    pairs = zip(scene.things, shares, strict=True)
    return _words([thing for thing, share in pairs if share >= _SEEN])


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


@dataclass(frozen=True, slots=True)
class Lesson:
    """A part of stage one: `steps` steps on a pool of `pool` pictures of one kind (None: as in
    `MIX`). A step reads the overviews of `pictures` pictures and `quarters` of their tiles."""

    kind: str | None
    pool: int
    steps: int
    pictures: int
    quarters: int


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
    lessons: Sequence[tuple[Lesson, Pool]],
    *,
    peak: float,
    seed: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train tower and connector; returns a log of losses and shares of right words."""
    optimisers = Optimisers(aligner.model, peak)
    rng = np.random.default_rng(seed)
    steps = sum(lesson.steps for lesson, _ in lessons)
    log: list[dict[str, float]] = []
    step = 0
    for lesson, pool in lessons:
        for _ in range(lesson.steps):
            index = rng.integers(0, len(pool.tiles), lesson.pictures)
            some = index[: lesson.quarters]
            quarter = rng.integers(0, 4, len(some))
            batch = np.concatenate([pool.tiles[index, 4], pool.tiles[some, quarter]])
            words = np.concatenate([pool.words[index, 4], pool.words[some, quarter]])
            loss, right = aligner.loss(aligner.features(batch), words)
            optimisers.step(loss, rate(step, steps))
            step += 1
            progress(step, steps)
            if step % 50 == 0 or step == steps:
                share = float(right[: lesson.pictures].float().mean())
                log.append({"step": step, "loss": float(loss.detach()), "right": share})
    return log


@torch.inference_mode()
def words_right(aligner: Aligner, pool: Pool) -> dict[str, float]:
    """Share of right words in the overviews of a pool, by kind of scene."""
    right = []
    for at in range(0, len(pool.tiles), 64):
        features = aligner.features(pool.tiles[at : at + 64, 4])
        right.append(aligner.loss(features, pool.words[at : at + 64, 4])[1])
    all_right = torch.cat(right).float().mean(1).tolist()
    kinds = [scene.kind for scene in pool.scenes]
    return {
        kind: float(np.mean([r for r, k in zip(all_right, kinds, strict=True) if k == kind]))
        for kind in dict.fromkeys(kinds)
    }
