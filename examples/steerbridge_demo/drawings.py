"""Pictures for the demo model: icons on backgrounds, drawn by PIL, the same from the same seed.

A `Scene` says everything about a picture in words and numbers; `draw` makes it. Positions and
sizes are shares of the shorter side, turns are degrees. The hazards among the icons are as
plain as the rest: no people, no gore.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from steerbridge.errors import DataError, Problem
from steerbridge_demo.vocabulary import COLOURS, OBJECTS, TRAIN_PAIRS

RGB = tuple[int, int, int]
Point = tuple[float, float]

TRAIN_STYLES: Final = ("flat", "outlined", "shadow")
UNSEEN_STYLE: Final = "hatched"
STYLES: Final = (*TRAIN_STYLES, UNSEEN_STYLE)
BACKGROUNDS: Final = ("plain", "gradient", "ground")

_PAPER: Final[tuple[RGB, ...]] = (
    *((236, 236, 240), (202, 221, 236), (216, 235, 211), (250, 236, 204), (236, 212, 222)),
    *((192, 194, 198), (124, 134, 144), (72, 82, 98), (226, 202, 174), (172, 201, 192)),
    *((46, 56, 78), (152, 124, 152), (96, 118, 96), (150, 172, 205), (206, 196, 226)),
)
_WOOD: Final[RGB] = (150, 118, 88)
_DARK_INK: Final[RGB] = (30, 30, 36)
_LIGHT_INK: Final[RGB] = (206, 206, 212)
_APART: Final = 95.0  # distance in RGB that a thing keeps from its background
_OVERSAMPLING: Final = 2


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its centre (x, y) as shares of width and height, `size` half its extent."""

    name: str
    colour: str
    x: float
    y: float
    size: float
    turn: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture of one thing, in words; `width` and `height` are pixels."""

    thing: Thing
    style: str
    width: int
    height: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Part:
    shade: str
    points: tuple[Point, ...]
    stroke: float | None  # None: a filled polygon


# ------------------------------------------------------------ sampling


def sample(
    rng: random.Random,
    *,
    pairs: Sequence[tuple[str, str]] = TRAIN_PAIRS,
    styles: Sequence[str] = TRAIN_STYLES,
    size: tuple[int, int] | None = None,
) -> Scene:
    """A random scene; its object and colour come from `pairs` (colour, name).

    Raises:
        DataError: an unknown style, or no pair at all.
    """
    if not set(styles) <= set(STYLES) or not styles:
        raise DataError(Problem("styles", f"some of {STYLES}", repr(styles)))
    if not pairs:
        raise DataError(Problem("pairs", "at least one", "none"))
    width, height = size or _random_size(rng)
    thing = _thing(rng, pairs)
    return Scene(thing, rng.choice(styles), width, height, rng.getrandbits(32))


def _random_size(rng: random.Random) -> tuple[int, int]:
    """Mostly 128 pixels square; else 96 to 300 a side, no side under 3/4 of the other."""
    if rng.random() < 0.5:
        return 128, 128
    long = rng.randint(96, 300)
    short = max(64, round(long * rng.uniform(0.75, 1.0)))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _thing(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Thing:
    colour, name = rng.choice(pairs)
    size = rng.uniform(0.36, 0.44)
    x, y = (rng.uniform(0.45, 0.55) for _ in range(2))
    return Thing(name, colour, x, y, size, rng.uniform(-8, 8))


# ------------------------------------------------------------ drawing


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, `width` x `height` pixels.

    Raises:
        DataError: an unknown object, colour or style, or a size outside 16..2048.
    """
    _check(scene)
    rng = random.Random(scene.seed)
    scale = _OVERSAMPLING
    canvas = _background(scene, rng, scale)
    _draw_thing(canvas, scene, rng)
    picture = canvas.reduce(scale)
    return _grain(picture, scene.seed) if rng.random() < 0.3 else picture


def _check(scene: Scene) -> None:
    for field, value, known in (
        ("thing", scene.thing.name, OBJECTS),
        ("colour", scene.thing.colour, tuple(COLOURS)),
        ("style", scene.style, STYLES),
    ):
        if value not in known:
            raise DataError(Problem(field, f"one of {known}", repr(value)))
    if not all(16 <= side <= 2048 for side in (scene.width, scene.height)):
        raise DataError(Problem("size", "16 to 2048 pixels", f"{scene.width}x{scene.height}"))


def _background(scene: Scene, rng: random.Random, scale: int) -> Image.Image:
    width, height = scene.width * scale, scene.height * scale
    colour = COLOURS[scene.thing.colour]
    usable = [p for p in _PAPER if math.dist(p, colour) > _APART]
    first, second = rng.choice(usable), rng.choice(usable)
    second = _mix(first, second, 0.5)
    canvas = Image.new("RGB", (width, height), first)
    pen = ImageDraw.Draw(canvas)
    kind = rng.choice(BACKGROUNDS)
    if kind == "gradient":
        strip = Image.new("RGB", (1, 2), first)
        strip.putpixel((0, 1), second)
        return strip.resize((width, height), Image.Resampling.BILINEAR)
    if kind == "ground":
        pen.rectangle((0, height * rng.uniform(0.55, 0.8), width, height), fill=second)
    return canvas


def _draw_thing(canvas: Image.Image, scene: Scene, rng: random.Random) -> None:
    thing = scene.thing
    side = min(canvas.size)
    turn = math.radians(thing.turn)
    cos, sin = math.cos(turn) * thing.size * side, math.sin(turn) * thing.size * side
    left, top = thing.x * canvas.width, thing.y * canvas.height

    def placed(point: Point, dx: float = 0.0) -> Point:
        x, y = point
        return left + cos * x - sin * y + dx, top + sin * x + cos * y + dx

    shades = _shades(thing.colour, rng)
    unit = thing.size * side
    if scene.style == "shadow":
        for part in _icon(thing.name):
            points = [placed(p, 0.1 * unit) for p in part.points]
            _part(canvas, part, points, _DARK_INK_SOFT, unit, None)
    contour = _DARK_INK if scene.style == "outlined" else None
    for part in _icon(thing.name):
        edge = contour if part.shade == "body" else None
        points = [placed(p) for p in part.points]
        _part(canvas, part, points, shades[part.shade], unit, edge)
        if scene.style == "hatched" and part.shade == "body" and part.stroke is None:
            _hatch(canvas, points, shades["dark"], unit)


_DARK_INK_SOFT: Final[RGB] = (84, 84, 92)


def _part(
    canvas: Image.Image,
    part: _Part,
    points: list[Point],
    fill: RGB,
    unit: float,
    edge: RGB | None,
) -> None:
    pen = ImageDraw.Draw(canvas)
    if part.stroke is not None:
        pen.line(points, fill=fill, width=max(1, round(part.stroke * unit)), joint="curve")
    elif edge is None:
        pen.polygon(points, fill=fill)
    else:
        pen.polygon(points, fill=fill, outline=edge, width=max(1, round(0.07 * unit)))


def _hatch(canvas: Image.Image, points: list[Point], colour: RGB, unit: float) -> None:
    """Diagonal lines over the inside of a polygon."""
    mask = Image.new("1", canvas.size)
    ImageDraw.Draw(mask).polygon(points, fill=1)
    lines = Image.new("1", canvas.size)
    pen = ImageDraw.Draw(lines)
    step = max(4, round(0.22 * unit))
    for x in range(-canvas.height, canvas.width, step):
        pen.line((x, 0, x + canvas.height, canvas.height), fill=1, width=max(1, step // 3))
    lines.paste(0, mask=Image.eval(mask.convert("L"), lambda v: 255 - v))
    canvas.paste(colour, mask=lines)


def _shades(colour: str, rng: random.Random) -> dict[str, RGB]:
    base = COLOURS[colour]
    spread = 8 if colour in ("black", "white") else 14
    red, green, blue = (min(255, max(0, v + rng.randint(-spread, spread))) for v in base)
    body = (red, green, blue)
    light = _mix(body, (255, 255, 255), 0.6) if colour != "white" else (204, 208, 214)
    dark = _mix(body, (0, 0, 0), 0.4) if colour != "black" else (80, 80, 86)
    ink = _LIGHT_INK if colour in ("black", "purple", "brown") else _DARK_INK
    return {"body": body, "light": light, "dark": dark, "ink": ink, "wood": _WOOD}


def _mix(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _grain(picture: Image.Image, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-9, 10, (picture.height, picture.width, 1))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------ icons


def _icon(name: str) -> tuple[_Part, ...]:
    return _icons()[name]


@cache
def _icons() -> dict[str, tuple[_Part, ...]]:
    """The parts of every icon in `data/icons.txt`."""
    icons: dict[str, list[_Part]] = {}
    parts: list[_Part] = []
    text = files(__name__.partition(".")[0]).joinpath("data", "icons.txt").read_text("utf-8")
    for line in text.splitlines():
        words = line.split()
        if not words or words[0] == "#":
            continue
        if words[0] == "=":
            parts = icons.setdefault(words[1], [])
        else:
            parts.append(_parsed(words[0], words[1], [float(w) for w in words[2:]]))
    return {name: tuple(parts) for name, parts in icons.items()}


def _parsed(shade: str, shape: str, numbers: list[float]) -> _Part:
    if shape == "ellipse":
        cx, cy, rx, ry = numbers
        return _Part(shade, _on_ellipse(cx, cy, rx, ry, 0, 360), None)
    if shape == "arc":
        width, cx, cy, rx, ry, start, end = numbers
        return _Part(shade, _on_ellipse(cx, cy, rx, ry, start, end), width)
    stroke = numbers.pop(0) if shape == "line" else None
    return _Part(shade, tuple(zip(numbers[::2], numbers[1::2], strict=True)), stroke)


def _on_ellipse(
    cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int = 24
) -> tuple[Point, ...]:
    angles = (math.radians(start + (end - start) * i / steps) for i in range(steps + 1))
    return tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles)
