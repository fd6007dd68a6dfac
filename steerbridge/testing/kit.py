"""What a shape works with: models, cases, a running guard, and the comparison with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steerbridge.errors import SteerbridgeError
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.testing.cases import NEW, Case, pictured, standard
from steerbridge.testing.driver import Ability, Driver, Files, How, Reply, Running
from steerbridge.testing.model import EOS, HEADS, TEMPLATE, WIDTH, TinyModel
from steerbridge.testing.oracle import Expected, plain

Status = Literal["right", "refused", "absent", "wrong"]


class Wrong(AssertionError):
    """The runtime did something else than it must."""


class Lacking(Exception):
    """The runtime has no such thing, as only trying it can show; the shape is absent."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a runtime did with one shape. `detail` says what was refused, lacking or wrong."""

    status: Status
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of request, and what a driver must be able to do to try it."""

    name: str
    run: Callable[[Trial], None]
    needs: frozenset[Ability] = frozenset()


class Ground:
    """Tiny models, their files and cases, shared by all drivers and shapes.

    Args:
        folder: where the files are written.
        head: width of an attention head of the models.
    """

    def __init__(self, folder: Path, *, head: int = WIDTH // HEADS) -> None:
        self.folder = folder
        self.model = TinyModel(head=head)
        self.files = Files(self.model, folder / "plain")
        self._cases: dict[str, Case] = {}

    @cached_property
    def templated(self) -> Files:
        """The same model with a chat template."""
        return Files(TinyModel(template=TEMPLATE, head=self.model.head), self.folder / "templated")

    @cached_property
    def standard(self) -> Mapping[str, Case]:
        """The cases that shapes use again and again."""
        return standard(self.model)

    @cached_property
    def with_tower(self) -> Files:
        """A model with a vision tower."""
        return Files(TinyModel(pictures=True, head=self.model.head), self.folder / "pictures")

    @cached_property
    def pictured(self) -> Mapping[str, Case]:
        """The cases whose prompts hold pictures."""
        return pictured(self.with_tower.model)

    def case(self, key: str, make: Callable[[], Case]) -> Case:
        """A case that is made once."""
        if key not in self._cases:
            self._cases[key] = make()
        return self._cases[key]


class Kept:
    """Guarded models that stay open between shapes, `Driver.kept_open` of them at most.

    Starting a program takes longer than asking it, and a request behind any other must be right.
    One that a shape does not leave well is closed: what it does afterwards shows nothing.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._open: dict[tuple[Path, str], tuple[ExitStack, Running]] = {}

    @contextmanager
    def opened(
        self, files: Files, package: SteeringPackage, alone: bool = False
    ) -> Iterator[Running]:
        """A model with a package; `alone`: opened for this, and closed behind it."""
        if alone:
            with self._driver.open(files, package) as running:
                yield running
            return
        key = (files.folder, package.sha256)
        if key in self._open:
            stack, kept = self._open.pop(key)
        else:
            stack = ExitStack()
            kept = stack.enter_context(self._driver.open(files, package))
        try:
            yield kept
        except BaseException:
            stack.close()
            raise
        self._open[key] = (stack, kept)
        while len(self._open) > self._driver.kept_open:
            self._open.pop(next(iter(self._open)))[0].close()

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.popitem()[1][0].close()


@dataclass(frozen=True)
class Trial:
    """One shape on one driver."""

    driver: Driver
    ground: Ground
    kept: Kept

    @property
    def model(self) -> TinyModel:
        return self.ground.model

    def case(self, name: str = "head") -> Case:
        """A standard case."""
        return self.ground.standard[name]

    @contextmanager
    def guarded(self, case: Case | str = "head", *, alone: bool = False) -> Iterator[Guarded]:
        """The model with the package of a case; `alone`: opened for this, and closed behind it."""
        chosen = self.case(case) if isinstance(case, str) else case
        files = self.ground.with_tower if chosen.model.tower else self.ground.files
        with self.kept.opened(files, chosen.package, alone) as running:
            yield Guarded(self.driver, running, chosen)

    @contextmanager
    def refusal(self, what: str) -> Iterator[None]:
        """The code inside must end in a typed error."""
        try:
            yield
        except SteerbridgeError:
            return
        raise Wrong(f"{what}: answered, but had to be refused")

    def plain(self, prompts: Sequence[str], new: int = NEW, **how: Any) -> Sequence[Reply]:
        """Replies of the runtime without a package."""
        with self.driver.open(self.ground.files, None) as running:
            return running.ask(prompts, new, How(**how))


@dataclass(frozen=True)
class Guarded:
    """A running model with the package of a case."""

    driver: Driver
    running: Running
    case: Case

    def ask(self, prompts: Sequence[str], new: int = NEW, **how: Any) -> Sequence[Reply]:
        """Ask, and compare nothing."""
        return self.running.ask(prompts, new, How(**how))

    def right(self, prompts: Sequence[str], new: int = NEW, **how: Any) -> Sequence[Reply]:
        """Ask, and compare every reply with the oracle.

        Raises:
            Wrong: a reply is not the right one.
        """
        asked = How(**how)
        replies = self.running.ask(prompts, new, asked)
        if len(replies) != len(prompts) * asked.samples:
            raise Wrong(f"{len(replies)} replies to {len(prompts)} prompts")
        for i, reply in enumerate(replies):
            prompt = prompts[i // asked.samples]
            self._compare(prompt, reply, self.case.expected(prompt, new), asked)
        return replies

    def _compare(self, prompt: str, reply: Reply, expected: Expected, how: How) -> None:
        name = f"prompt {i!r}" if (i := prompt[:40]) == prompt else f"prompt {i!r}..."
        # A program that is given up may have gone on for a while.
        counts = not how.cancel_after or self.case.new == 1
        if reply.outcome is not None and counts:
            want = expected.outcome if self.driver.tells_the_end else expected.told
            assert want is not None
            scores = self.driver.tells_the_end or "answer" not in {
                v.fired_in for v in want.verdicts
            }
            compare_outcomes(name, reply.outcome, want, self.driver.tolerance, scores=scores)
        if reply.tokens is None or how.padding == "right":  # padded answers mean nothing there
            return
        tokens = expected.tokens if how.beams == 1 else expected.tokens[:0]
        got = reply.tokens
        if how.cancel_after:
            tokens, got = tokens[: how.cancel_after], got[: how.cancel_after]
        certain = expected.certain(self.driver.margin)[: len(tokens)]
        if certain and certain[-1] == EOS:  # a program may keep it to itself
            certain, got = certain[:-1], got[: got.index(EOS)] if EOS in got else got
            ends = len(got) == len(certain)
        else:
            ends = True
        if got[: len(certain)] != certain or not ends:
            told = self._instead(prompt, got, len(expected.tokens))
            raise Wrong(f"{name}: expected tokens {list(certain)}, found {list(got)}{told}")

    def _instead(self, prompt: str, got: tuple[int, ...], new: int) -> str:
        """Whose tokens these are, if they are the unsteered model's."""
        unsteered = plain(self.case.model, self.case.model.encode(prompt), new)
        return " (those of the unsteered model)" if got == unsteered.tokens else ""


def compare_outcomes(
    name: str, got: Outcome, want: Outcome, tolerance: float, *, scores: bool = True
) -> None:
    """Compare verdicts and rules.

    Args:
        scores: whether the scores must be close.

    Raises:
        Wrong: names the first difference.
    """
    if [v.probe for v in got.verdicts] != [v.probe for v in want.verdicts]:
        raise Wrong(f"{name}: verdicts of {[v.probe for v in got.verdicts]}")
    for have, must in zip(got.verdicts, want.verdicts, strict=True):
        if must.unjudged and not have.unjudged:
            raise Wrong(f"{name}: {must.probe} is not unjudged ({must.unjudged}), found {have}")
        close = np.isclose(have.score, must.score, rtol=tolerance, atol=tolerance, equal_nan=True)
        places = [(v.fired, v.fired_in, v.row) for v in (have, must)]
        if places[0] != places[1] or (scores and not close):
            raise Wrong(f"{name}: expected {must}, found {have}")
        if not np.isclose(have.threshold, must.threshold, rtol=1e-6):
            raise Wrong(f"{name}: expected threshold {must.threshold}, found {have.threshold}")
    if set(got.rules) != set(want.rules):
        raise Wrong(f"{name}: expected rules {want.rules}, found {got.rules}")
