"""The guards that benchmarks measure: trained when first needed, then kept.

A guard lies in `.cache/guards` under its name and a key: a hash of its settings, its prompts and
pictures, the model's weights and the version of Steerbridge. A figure names its guard by name and
the first digits of the package's hash (`str(guard)`), for every training makes another package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import steerbridge
from common import CACHE, leaking, open_demo, open_smollm2, progress, say, splits
from steerbridge import Example, SteeringPackage, TrainSettings, corpus_examples, smollm2
from steerbridge.data import sha256
from steerbridge.datasets.groups import folds
from steerbridge.training.settings import HeadSettings
from steerbridge_demo.guard import demo_examples, guard_examples
from steerbridge_demo.weights import shipped_bytes

Pairs = Sequence[tuple[str, str]]
PICTURED = ("image", "both", "general")
FOLDER = CACHE / "guards"


@dataclass(frozen=True)
class Guard:
    """A package and the file that it lies in."""

    path: Path
    package: SteeringPackage

    @property
    def evidence(self) -> Any:
        """What the package says about itself."""
        return self.package.spec.evidence

    def __str__(self) -> str:
        return f"{self.package.spec.name} {self.package.sha256[:12]}"


def at(path: Path) -> Guard:
    """The guard in a file or directory."""
    return Guard(path, steerbridge.load(path))


def add_option(parser: argparse.ArgumentParser, default: str = "pooled") -> None:
    parser.add_argument(
        "--guard",
        default=default,
        help=f"{', '.join(TEXT_GUARDS)} (trained if need be), or the path of a package; "
        "default: %(default)s",
    )


def chosen(options: argparse.Namespace) -> Guard:
    """The guard that the option names: for SmolLM2 and text."""
    make = TEXT_GUARDS.get(options.guard)
    guard = make(options.data) if make else at(Path(options.guard))
    say(f"guard: {guard}")
    return guard


# ------------------------------------------------------------ for SmolLM2


def demo_guard() -> Guard:
    """As in the first act of `make demo`: the shipped training prompts."""
    return trained(TrainSettings(name="smollm2-demo"), corpus_examples("train"))


def pooled_guard() -> Guard:
    """A guard as the paper has it: it reads whole prompts, and a head refuses."""
    known = [e for e in corpus_examples("train") if e.kind != "request"]
    examples = [e for e, fold in zip(known, folds(known, 2, 0), strict=True) if fold == 0]
    return trained(pooled("smollm2-pooled"), examples)


def pooled(name: str, **more: Any) -> TrainSettings:
    """Settings of such a guard."""
    return TrainSettings(
        name=name, refuse="head_matrix", reads="whole", forms={"chat": 1.0}, **more
    )


def safety_guard(folder: Path) -> Guard:
    """As in `make bench-safety`: public prompts where present, all shipped ones for training.

    Args:
        folder: with the public prompts (see `common.splits`).
    """
    training, _, _ = splits(folder)
    return trained(TrainSettings(name="smollm2-guard", answers=600), training)


def shipped_guard(folder: Path) -> Guard:
    """What a user without data gets: trained on the shipped prompts alone, those left out that are
    like a test prompt."""
    _, test, _ = splits(folder)
    known = corpus_examples("train") + corpus_examples("validation")
    alike = leaking(known, test)
    examples = [e for e, leaks in zip(known, alike, strict=True) if not leaks]
    return trained(TrainSettings(name="smollm2-shipped"), examples)


def parity_guard(model: Any) -> Guard:
    """A guard with one probe, on a part of the shipped prompts."""
    short = [e for e in corpus_examples("train") if len(e.text) < 120]
    pairs = [e for e in short if e.kind == "pair"][:400]
    general = [e for e in short if e.kind == "general"][:200]
    settings = pooled("parity-guard", head=HeadSettings(steps=80), head_prompts=64)
    return trained(settings, [*pairs, *general], lambda: model)


# ------------------------------------------------------------ for the demo vision-language model


def demo_vlm_guard() -> Guard:
    """As in the second act of `make demo`."""
    settings = TrainSettings(name="demo-vlm", target_fpr=0.04)
    return trained(settings, demo_examples(FOLDER / "drawings"), open_demo, shipped_bytes())


def multimodal_guard(
    folder: Path, *, per_kind: int = 180, texts: int = 1200, model: Any = None
) -> Guard:
    """As in `make bench-safety-multimodal`: drawings and texts of the training splits.

    Args:
        folder: with the public prompts (see `public_pairs`).
        per_kind: pictures of each kind.
        texts: pairs of texts. What is harmful in a text takes more examples than what is in a
            picture.
        model: if given, the guard is trained anew with it.
    """
    place = FOLDER / f"drawings-{per_kind}-{texts}"
    pairs, _ = public_pairs(folder)
    examples = [
        *guard_examples(place / "drawings", "train", per_kind=per_kind, kinds=PICTURED),
        *guard_examples(place / "texts", "train", per_kind=texts, kinds=("text",), texts=pairs),
        *guard_examples(place / "drawings", "validation", per_kind=per_kind // 5, kinds=PICTURED),
        *[e for e in corpus_examples("train") if e.kind == "general"][: per_kind // 2],
    ]
    settings = TrainSettings(name="demo-vlm-guard", target_fpr=0.02)
    return trained(settings, examples, open_demo, shipped_bytes(), model=model)


def public_pairs(folder: Path) -> tuple[Pairs | None, Pairs | None]:
    """Harmful texts with their harmless mirrors to train on, and others to measure on; None
    where the public set is not present: then the shipped corpus is used."""
    path = folder / "vlsafe_pairs.jsonl"
    if not path.is_file():
        return None, None
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    pairs = [(line["harmful"], line["harmless"]) for line in lines]
    return pairs[:2000], pairs[2000:]


# ------------------------------------------------------------ training


def trained(
    settings: TrainSettings,
    examples: Sequence[Example],
    open_model: Callable[[], Any] = open_smollm2,
    weights: bytes = b"",
    *,
    model: Any = None,
) -> Guard:
    """The guard of these settings and examples: the kept one, or trained now.

    Args:
        open_model: opens the model to train it with.
        weights: of the model, beside those of SmolLM2.
        model: if given, the guard is trained anew with it, on kept states where there are any.
    """
    place = FOLDER / f"{settings.name}-{key(settings, examples, weights)}"
    path = place / "guard.gguf"
    if model is not None or not path.is_file():
        say(f"training {settings.name} on {len(examples)} prompts")
        package = steerbridge.train(
            open_model() if model is None else model,
            examples,
            settings,
            workdir=place / "states",
            progress=progress(),
        )
        package.save(path)
    return at(path)


def key(settings: TrainSettings, examples: Sequence[Example], weights: bytes) -> str:
    """Names what a guard is made from."""
    parts = (
        steerbridge.__version__.encode(),
        repr(settings).encode(),
        sha256(examples).encode(),
        smollm2().read_bytes(),
        weights,
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]


TEXT_GUARDS: dict[str, Callable[[Path], Guard]] = {
    "pooled": lambda _: pooled_guard(),
    "demo": lambda _: demo_guard(),
    "safety": safety_guard,
    "shipped": shipped_guard,
}
PICTURE_GUARDS: dict[str, Callable[[Path], Guard]] = {
    "demo": lambda _: demo_vlm_guard(),
    "safety": multimodal_guard,
}
