"""Labelled prompts with pictures for the guard: `python -m steerbridge_demo.guard OUTDIR`.

Four kinds. `text`: a harmful text, or its harmless mirror, with an unrelated harmless picture.
`image`: an innocent question about a picture whose class is always refused, or about the same
picture with an ordinary object in its place. `both`: harm in the combination only; an icon that
is fine to describe and not fine to ask how to make, beside the same question about an ordinary
object, or an innocent question about the same picture. `general`: ordinary questions, with and
about harmless pictures, and innocent questions about the icons of `both`.

Splits: `train`, `validation` (other stems and texts), `test` (stems of training, texts of the
corpus' test split, pairs of colour and object never trained on among others), `unseen_stems`
and `unseen_style` (as `test`, with stems or a drawing style never trained on). No two splits
share a picture.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from steerbridge import corpus
from steerbridge.atomic import replacing
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge_demo.drawings import TRAIN_STYLES, UNSEEN_STYLE, Scene, draw, sample
from steerbridge_demo.questions import ask, stems
from steerbridge_demo.vocabulary import DUAL, ORDINARY, PAIRS, REFUSED, TRAIN_PAIRS

KINDS: Final = ("text", "image", "both", "general")
SPLITS: Final = ("train", "validation", "test", "unseen_stems", "unseen_style")


@dataclass(frozen=True, slots=True)
class GuardPrompt:
    """A labelled prompt, and what to hold out by: its stem (None: a text of its own), the
    object in its picture and the drawing style."""

    example: Example
    stem: str | None
    object: str
    style: str


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a split may use."""

    stems: tuple[str, ...]  # splits of them
    texts: str
    pairs: tuple[tuple[str, str], ...]
    styles: tuple[str, ...]


_RULES: Final = {
    "train": _Rules(("train", "guard"), "train", TRAIN_PAIRS, TRAIN_STYLES),
    "validation": _Rules(("validation",), "validation", TRAIN_PAIRS, TRAIN_STYLES),
    "test": _Rules(("train", "guard"), "test", PAIRS, TRAIN_STYLES),
    "unseen_stems": _Rules(("test",), "test", PAIRS, TRAIN_STYLES),
    "unseen_style": _Rules(("train", "guard"), "test", PAIRS, (UNSEEN_STYLE,)),
}


def guard_prompts(
    directory: Path,
    split: str,
    *,
    per_kind: int = 100,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    size: tuple[int, int] | None = None,
    texts: Sequence[tuple[str, str]] | None = None,
) -> list[GuardPrompt]:
    """Labelled prompts of a split, their pictures written to `directory/split` as PNG.

    Each of the kinds text, image and both gives `per_kind` aligned pairs (two prompts that
    share `Example.pair`), general gives `per_kind` harmless prompts. `size` fixes width and
    height in pixels. `texts` are pairs (harmful, harmless) for the kind text; None: those of the
    shipped corpus. The same arguments give the same prompts and pictures.

    Raises:
        DataError: an unknown split or kind, or a number that is not positive.
    """
    if split not in SPLITS:
        raise DataError(Problem("split", f"one of {SPLITS}", repr(split)))
    if not set(kinds) <= set(KINDS) or per_kind < 1:
        want = f"kinds among {KINDS}, at least one a kind"
        raise DataError(Problem("kinds", want, f"{kinds!r}, {per_kind}"))
    folder = directory / split
    folder.mkdir(parents=True, exist_ok=True)
    prompts: list[GuardPrompt] = []
    for kind in kinds:
        rng = random.Random(f"guard {split} {kind} {seed}")
        maker = _Maker(folder, split, kind, _RULES[split], rng, size, texts)
        prompts += _MAKERS[kind](maker, per_kind)
    return prompts


def guard_examples(directory: Path, split: str, **options: Any) -> list[Example]:
    """The examples of `guard_prompts`."""
    return [p.example for p in guard_prompts(directory, split, **options)]


def demo_examples(directory: Path) -> list[Example]:
    """What `make demo` trains on: more texts than pictures, for harm in a text takes more examples;
    and ordinary questions enough to tell how many fire."""
    counts = {"text": 300, "image": 100, "both": 100, "general": 250}
    return [
        example
        for kind, count in counts.items()
        for example in guard_examples(directory / kind, "train", per_kind=count, kinds=(kind,))
    ]


def write_jsonl(directory: Path, split: str, *, per_kind: int = 100, seed: int = 0) -> Path:
    """Write `directory/split.jsonl` with its pictures beside it, for `--data` of the CLI."""
    path = directory / f"{split}.jsonl"
    lines = [
        json.dumps(
            {
                "prompt": e.text,
                "harmful": e.harmful,
                "kind": e.kind,
                "pair": e.pair,
                "images": [str(image.relative_to(directory)) for image in e.images],
            }
        )
        for e in guard_examples(directory, split, per_kind=per_kind, seed=seed)
    ]
    with replacing(path) as fresh:
        fresh.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# ------------------------------------------------------------ the kinds


@dataclass(slots=True)
class _Maker:
    """Draws pictures and builds prompts of one kind."""

    folder: Path
    split: str
    kind: str
    rules: _Rules
    rng: random.Random
    size: tuple[int, int] | None
    texts: Sequence[tuple[str, str]] | None
    drawn: int = 0

    def scene(self, names: Sequence[str]) -> Scene:
        pairs = [p for p in self.rules.pairs if p[1] in names]
        return sample(self.rng, pairs=pairs, styles=self.rules.styles, size=self.size)

    def swapped(self, scene: Scene, names: Sequence[str]) -> Scene:
        """The same scene with another object in its colour."""
        thing = scene.thing
        usable = [name for name in names if (thing.colour, name) in self.rules.pairs]
        return replace(scene, thing=replace(thing, name=self.rng.choice(usable)))

    def stem(self, kind: str) -> str:
        return self.rng.choice([s for split in self.rules.stems for s in stems(kind, split)])

    def picture(self, scene: Scene) -> Path:
        path = self.folder / f"{self.kind}-{self.drawn:05}.png"
        self.drawn += 1
        draw(scene).save(path)
        return path

    def prompt(
        self,
        text: str,
        harmful: bool,
        scene: Scene,
        image: Path,
        pair: str | None = None,
        stem: str | None = None,
    ) -> GuardPrompt:
        example = Example(text, harmful, self.kind, pair, (image,), stem)
        return GuardPrompt(example, stem, scene.thing.name, scene.style)

    def name(self, number: int) -> str:
        return f"demo:{self.kind}:{self.split}:{number}"


def _text(maker: _Maker, count: int) -> Iterator[GuardPrompt]:
    whole = maker.texts or _corpus_pairs(maker.rules.texts)
    picks = maker.rng.sample(whole, min(count, len(whole)))
    for number in range(count):
        scene = maker.scene(ORDINARY)
        image = maker.picture(scene)
        for text, harmful in zip(picks[number % len(picks)], (True, False), strict=True):
            yield maker.prompt(text, harmful, scene, image, maker.name(number))


def _corpus_pairs(split: str) -> list[tuple[str, str]]:
    """Harmful texts of the corpus with their harmless mirrors."""
    sides: dict[int, dict[bool, str]] = {}
    for p in corpus.prompts(split=split, kind="pair"):
        if p.partner is not None:
            sides.setdefault(p.partner, {})[p.harmful] = p.text
    return [(both[True], both[False]) for both in sides.values() if len(both) == 2]


def _image(maker: _Maker, count: int) -> Iterator[GuardPrompt]:
    for number in range(count):
        scene = maker.scene(REFUSED)
        stem = maker.stem("make" if number % 5 == 4 else "describe")
        for harmful, shown in ((True, scene), (False, maker.swapped(scene, ORDINARY))):
            image = maker.picture(shown)
            yield maker.prompt(stem, harmful, shown, image, maker.name(number), stem)


def _both(maker: _Maker, count: int) -> Iterator[GuardPrompt]:
    for number in range(count):
        scene = maker.scene(DUAL)
        image = maker.picture(scene)
        name, stem = maker.name(number), maker.stem("make")
        yield maker.prompt(stem, True, scene, image, name, stem)
        if number % 5 < 3:
            other = maker.swapped(scene, ORDINARY)
            yield maker.prompt(stem, False, other, maker.picture(other), name, stem)
        else:
            innocent = maker.stem("describe")
            yield maker.prompt(innocent, False, scene, image, name, innocent)


def _general(maker: _Maker, count: int) -> Iterator[GuardPrompt]:
    texts = [p.text for p in corpus.prompts(split=maker.rules.texts, kind="general")]
    picks = maker.rng.sample(texts, min(count, len(texts)))
    for number in range(count):
        scene = maker.scene(DUAL if number % 4 == 0 else ORDINARY)
        image = maker.picture(scene)
        if number % 2 and picks:
            yield maker.prompt(picks[number // 2 % len(picks)], False, scene, image)
        elif number % 4 == 0:
            stem = maker.stem("describe")
            yield maker.prompt(stem, False, scene, image, stem=stem)
        else:
            question = ask(scene, maker.rng, maker.rules.stems[0])
            yield maker.prompt(question.text, False, scene, image, stem=question.text)


_MAKERS: Final[dict[str, Callable[[_Maker, int], Iterator[GuardPrompt]]]] = {
    "text": _text,
    "image": _image,
    "both": _both,
    "general": _general,
}


def main(arguments: list[str] | None = None) -> None:
    """Write JSON Lines and pictures of every split; prints the paths as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m steerbridge_demo.guard")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    written = {
        split: str(
            write_jsonl(options.directory, split, per_kind=options.per_kind, seed=options.seed)
        )
        for split in SPLITS
    }
    print(json.dumps(written))


if __name__ == "__main__":
    main()
