"""The seam between the core and converters, and how formats are found.

A format says what its files hold, what they leave open, and how they are read and written. A
converter registers it under the entry-point group `steerbridge.formats`; the core never imports
a converter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from steerbridge.errors import (
    NotRepresentable,
    Problem,
    Unanswered,
    UnknownFormat,
    UnreadableSource,
)
from steerbridge.package import SteeringPackage
from steerbridge.spec import BaseModelInfo, ConstantStrength, Rule


@dataclass(frozen=True, slots=True)
class Ask:
    """Something the files of a format do not say.

    `default` is what the tool itself does when nobody says otherwise; without one the user must
    answer, because a guess could turn the meaning round.
    """

    name: str
    kind: Callable[[str], Any]
    help: str
    default: Any = None

    def parse(self, text: str, format: str) -> Any:
        """The answer as a value.

        Raises:
            Unanswered: the text is not one.
        """
        try:
            return self.kind(text)
        except ValueError as error:
            raise Unanswered(format, self.name, f"{self.help}; found {text!r}: {error}") from error


def one_of(*choices: str) -> Callable[[str], str]:
    """The kind of an answer that is one of some words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The kind of an answer that is a list joined by commas."""
    return lambda text: tuple(kind(part) for part in text.split(","))


@dataclass(frozen=True, slots=True)
class Given:
    """What the user said beside the files: answers, the base model, weights of that model."""

    format: str
    answers: Mapping[str, str] = field(default_factory=dict)
    base: BaseModelInfo | None = None
    model: Path | None = None
    lost: list[Loss] = field(default_factory=list)
    """Losses that show only while reading; a reader appends them."""

    def __call__(self, ask: Ask) -> Any:
        """The answer, or the tool's own default.

        Raises:
            Unanswered: neither is there, or the answer cannot be read.
        """
        if ask.name in self.answers:
            return ask.parse(self.answers[ask.name], self.format)
        if ask.default is None:
            raise Unanswered(self.format, ask.name, ask.help)
        return ask.default

    def base_model(self, **found: Any) -> BaseModelInfo:
        """The base model, checked against what the file says of it.

        Raises:
            Unanswered: no base model was named.
            NotRepresentable: the file was made for another model.
        """
        if self.base is None:
            raise Unanswered(
                self.format, "base", "the model it was made for: a directory, GGUF or package"
            )
        wrong = [
            Problem(key, repr(getattr(self.base, key)), repr(value))
            for key, value in found.items()
            if value is not None and getattr(self.base, key) != value
        ]
        if wrong:
            raise NotRepresentable(
                self.format, f"not made for {self.base.name}: " + "; ".join(map(str, wrong))
            )
        return self.base


@dataclass(frozen=True, slots=True)
class Loss:
    """Something a target cannot hold. `effect` says in words what changes for requests."""

    what: str
    effect: str

    def __str__(self) -> str:
        return f"{self.what}: {self.effect}"


@dataclass(frozen=True, slots=True)
class Holds:
    """What the files of a format can say, in the words of the spec."""

    probes: frozenset[str] = frozenset()  # types of probe
    interventions: frozenset[str] = frozenset()  # types of intervention
    gates: bool = False  # that a probe decides when interventions act
    from_prompt_end: bool = False  # that the prompt itself is left alone
    sites: str = ""  # for people
    strength: str = ""  # for people
    records: bool = False  # base model, evidence, calibrations


class Format(ABC):
    """A format of one tool. Subclasses are stateless; `name` is what users type."""

    name: ClassVar[str]
    title: ClassVar[str]
    holds: ClassVar[Holds]
    asks: ClassVar[tuple[Ask, ...]] = ()  # when reading
    write_asks: ClassVar[tuple[Ask, ...]] = ()
    exact: ClassVar[bool] = True  # what was written is read as it was, bit for bit
    needs_model: ClassVar[bool] = False  # weights of the base model (its output embedding)
    atomic: ClassVar[bool] = False  # `write` itself replaces an older target safely

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """True if `path` looks like this format; opens nothing that could run code."""

    @abstractmethod
    def contents(self, path: Path) -> dict[str, Any]:
        """What the files say, for `inspect`: plain JSON values, no answers needed.

        Raises:
            UnreadableSource: the files are malformed.
        """

    @abstractmethod
    def read(self, path: Path, given: Given) -> SteeringPackage:
        """The files as a steering package.

        Raises:
            UnreadableSource: the files are malformed.
            Unanswered: the files leave something open that was not given.
            NotRepresentable: they hold what no package can say.
        """

    @abstractmethod
    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        """Write what this format holds of `package` at the fresh path `path`.

        Raises:
            NotRepresentable: a part that stays has no counterpart here.
        """

    def losses(self, package: SteeringPackage, given: Given) -> list[Loss]:
        """What `write` would leave out or change.

        Raises:
            NotRepresentable: nothing would be left.
        """
        return list(losses(package, self.holds, self.name))


def losses(package: SteeringPackage, holds: Holds, name: str) -> Iterator[Loss]:
    """The losses that follow from what a format holds."""
    spec = package.spec
    kept = {i.id for i in spec.interventions if i.type in holds.interventions}
    probes = {p.id for p in spec.probes if p.type in holds.probes}
    if not kept and not probes:
        raise NotRepresentable(name, "no part of this package: " + _kinds(package))
    for probe in spec.probes:
        if probe.id not in probes:
            yield Loss(f"probe {probe.id} ({probe.type})", "is dropped")
    for intervention in spec.interventions:
        if intervention.id not in kept:
            yield Loss(
                f"intervention {intervention.id} ({intervention.type})",
                "is dropped: it will never act",
            )
        elif intervention.position == "from_prompt_end" and not holds.from_prompt_end:
            yield Loss(
                f"intervention {intervention.id}",
                "acts on the tokens of the prompt too, not only from its end on",
            )
    for rule in spec.rules:
        yield from _rule_losses(rule, kept, probes, holds)
    if spec.calibrations and not holds.records and probes:
        yield Loss("calibrations", "are dropped: the threshold is that of the HF runtime")


def _rule_losses(rule: Rule, kept: set[str], probes: set[str], holds: Holds) -> Iterator[Loss]:
    acting = [id for id in rule.interventions if id in kept]
    if not acting:
        return
    named = ", ".join(acting)
    if rule.condition is not None:
        missing = [id for id in rule.condition.probes if id not in probes]
        if not holds.gates:
            yield Loss(f"rule {rule.id}", f"is dropped: {named} will act on every prompt")
        elif missing:
            yield Loss(
                f"rule {rule.id}",
                f"no longer asks {', '.join(missing)}: {named} will act on other prompts",
            )
    if not isinstance(rule.strength, ConstantStrength) and not holds.records:
        yield Loss(
            f"rule {rule.id}", f"its strength follows no score: {named} will act at full strength"
        )


def _kinds(package: SteeringPackage) -> str:
    parts = (*package.spec.probes, *package.spec.interventions)
    return ", ".join(f"{p.id} ({p.type})" for p in parts) or "it holds nothing"


def unreadable(path: Path, field: str, want: str, got: object) -> UnreadableSource:
    """The error of a malformed file."""
    return UnreadableSource(Problem(field, want, str(got)), path)


# ---------------------------------------------------------------- by name and by file


@cache
def formats() -> dict[str, Format]:
    """Every installed format by its name, in order of names."""
    found = (entry.load()() for entry in entry_points(group="steerbridge.formats"))
    return {format.name: format for format in sorted(found, key=lambda f: f.name)}


def named(name: str) -> Format:
    """The format of this name.

    Raises:
        UnknownFormat: there is none.
    """
    try:
        return formats()[name]
    except KeyError:
        raise UnknownFormat(f"no format is called {name!r}", tuple(formats())) from None


def detect(path: Path) -> Format:
    """The one format that recognises `path`.

    Raises:
        FileNotFoundError: there is nothing.
        UnknownFormat: none or several do; the user must name one.
    """
    if not path.exists():
        raise FileNotFoundError(f"nothing to convert at {path}")
    fitting = [format for format in formats().values() if format.recognises(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UnknownFormat(
            f"{path} may be of several formats; name one with --from", [f.name for f in fitting]
        )
    raise UnknownFormat(f"{path} is of no known format; name one with --from", tuple(formats()))
