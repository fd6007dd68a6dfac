"""Several prompts in one batch, and the logits of single ones."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from steerbridge.testing.driver import Ability
from steerbridge.testing.kit import Guarded, Trial, Wrong
from steerbridge.testing.shapes.table import Table

TABLE: Final = Table()


@TABLE.each("a batch of prompts that fire and quiet ones", Ability.BATCH)
def _(guard: Guarded) -> None:
    guard.right([guard.case.quiet[0], guard.case.fired[0], guard.case.quiet[1]])


@TABLE.shape("a batch of eight", Ability.BATCH)
def _(trial: Trial) -> None:
    with trial.guarded("both") as guard:
        guard.right([*guard.case.fired[:4], *guard.case.quiet[:4]])


@TABLE.shape("the same prompt twice in a batch", Ability.BATCH)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right([guard.case.fired[0], guard.case.fired[0], guard.case.quiet[0]])


def _padded(side: str) -> None:
    @TABLE.each(
        f"a batch padded on the {side}",
        Ability.BATCH,
        Ability.PADDING,
        kinds=("head", "mean", "earlier"),
    )
    def _(guard: Guarded) -> None:
        mixed = [*guard.case.fired[:2], *guard.case.quiet[:2]]
        guard.right(sorted(mixed, key=len), padding=side)


_padded("left")
_padded("right")


@TABLE.shape("quiet logits are bit-identical to the unsteered model's", Ability.LOGITS)
def _(trial: Trial) -> None:
    for which in ("head", "layers", "mean"):
        quiet = trial.case(which).quiet[:3]
        plain = [trial.plain([p])[0] for p in quiet]
        with trial.guarded(which) as guard:
            for prompt, want in zip(quiet, plain, strict=True):
                [reply] = guard.right([prompt])
                _same_bits(prompt, reply.logits, want.logits)


@TABLE.shape("a quiet neighbour in a batch keeps its logits", Ability.BATCH, Ability.LOGITS)
def _(trial: Trial) -> None:
    for which in ("head", "layers"):
        case = trial.case(which)
        batch = [case.quiet[0], case.fired[0], case.quiet[1]]
        plain = trial.plain(batch)
        with trial.guarded(which) as guard:
            replies = guard.right(batch)
        for i in (0, 2):
            _same_bits(batch[i], replies[i].logits, plain[i].logits)


def _same_bits(prompt: str, got: Any, want: Any) -> None:
    if got is None or want is None:
        raise Wrong(f"{prompt!r}: no logits, although the driver reads them")
    if not np.array_equal(got, want):
        raise Wrong(f"{prompt!r}: logits differ by {np.abs(got - want).max()}")


@TABLE.shape("steered logits equal the oracle's", Ability.LOGITS)
def _(trial: Trial) -> None:
    for which in ("head", "layers", "both"):
        with trial.guarded(which) as guard:
            prompt = guard.case.fired[0]
            [reply] = guard.right([prompt])
            want = guard.case.expected(prompt, 1).logits
            if reply.logits is None:
                raise Wrong(f"{prompt!r}: no logits, although the driver reads them")
            off = np.abs(reply.logits - want).max() / max(1.0, np.abs(want).max())
            if off > trial.driver.tolerance:
                raise Wrong(f"{prompt!r}: logits are off by {off}")
