"""The interface between the core and converters, and how formats are found.

A format declares what its files can represent, which options it needs because the files do not
say, and how the files are read and written. A converter registers it under the entry-point group
`steerbridge.formats`; the core never imports a converter.
"""

from __future__ import annotations

import os
import reprlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

from steerbridge import gguf_model, registry
from steerbridge.errors import (
    InvalidOption,
    MissingOption,
    NotRepresentable,
    Problem,
    UnknownFormat,
    UnreadableSource,
)
from steerbridge.package import SteeringPackage
from steerbridge.spec import BaseModelInfo, ConstantStrength, Rule

FLOAT32_MAX: Final = 3.4028235e38


@dataclass(frozen=True, slots=True)
class Option:
    """A value that the files of a format do not contain.

    `default` is the value that the tool itself uses. An option without a default must be given,
    because guessing wrong could invert the meaning.
    """

    name: str
    kind: Callable[[str], Any]
    help: str
    default: Any = None

    def parse(self, text: str, format: str) -> Any:
        """Convert the text of an answer to a value.

        Raises:
            InvalidOption: the text is not a valid value.
        """
        try:
            return self.kind(text)
        except ValueError as error:
            raise InvalidOption(
                format, self.name, f"{self.help}; found {text!r}: {error}"
            ) from error


def finite(text: str) -> float:
    """The kind of an option that is a finite number within the range of float32."""
    value = float(text)
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError("expected a finite number within the range of float32")
    return value


def block(text: str) -> int:
    """The kind of an option that is the number of a block."""
    value = int(text)
    if value < 0:
        raise ValueError("expected a block's number, 0 or higher")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """The kind of an option whose value is one of `choices`."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The kind of an option whose value is a comma-separated list."""
    return lambda text: tuple(kind(part) for part in text.split(","))


@dataclass(frozen=True, slots=True)
class Answers:
    """What the user supplied besides the files: option values, the base model and its weights."""

    format: str
    values: Mapping[str, str] = field(default_factory=dict)
    base: BaseModelInfo | None = None
    model: Path | None = None
    losses: list[Loss] = field(default_factory=list)
    """Losses that are known only while reading; a reader appends them."""

    def get(self, option: Option) -> Any:
        """The user's value for an option, or the option's default.

        Raises:
            MissingOption: there is neither.
            InvalidOption: the user's value cannot be parsed.
        """
        if option.name in self.values:
            return option.parse(self.values[option.name], self.format)
        if option.default is None:
            raise MissingOption(self.format, option.name, option.help)
        return option.default

    def base_model(self, **facts: Any) -> BaseModelInfo:
        """The base model, checked against the facts that the file states about it. Two words for
        one architecture (`mistral` and llama.cpp's `llama`) are the same.

        Raises:
            MissingOption: no base model was given.
            NotRepresentable: the file was made for another model.
        """
        if self.base is None:
            raise MissingOption(
                self.format,
                "base",
                "the model the artifact was made for: a directory, GGUF file or steering package",
            )
        wrong = [
            Problem(key, repr(getattr(self.base, key)), shown(value))
            for key, value in facts.items()
            if value is not None and _said(key, getattr(self.base, key)) != _said(key, value)
        ]
        if wrong:
            raise NotRepresentable(
                self.format, f"not made for {self.base.name}: " + "; ".join(map(str, wrong))
            )
        return self.base


def _said(key: str, value: Any) -> Any:
    return gguf_model.architecture(str(value)) if key == "model_type" else value


@dataclass(frozen=True, slots=True)
class Loss:
    """A part that the target cannot represent. `effect` says how requests will behave instead."""

    what: str
    effect: str

    def __str__(self) -> str:
        return f"{self.what}: {self.effect}"


@dataclass(frozen=True, slots=True)
class Holds:
    """What the files of a format can represent, in the terms of the spec."""

    probes: frozenset[str] = frozenset()  # types of probe
    token_readings: bool = False
    interventions: frozenset[str] = frozenset()  # types of intervention
    gates: bool = False  # a probe decides when interventions act
    from_prompt_end: bool = False  # the tokens of the prompt are not changed
    sites: str = ""  # free text
    strength: str = ""  # free text
    records: bool = False  # base model, evidence, calibrations


class Format(ABC):
    """A format of one tool. Subclasses are stateless; `name` is what users type."""

    name: ClassVar[str]
    title: ClassVar[str]
    holds: ClassVar[Holds]
    options: ClassVar[tuple[Option, ...]] = ()  # for reading
    write_options: ClassVar[tuple[Option, ...]] = ()
    exact: ClassVar[bool] = True  # writing and reading back is bit-identical
    writable: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False  # needs the output embedding of the base model
    # `write` itself reads back, compares and replaces an existing target atomically.
    atomic: ClassVar[bool] = False
    omits: ClassVar[frozenset[int]] = frozenset()  # depths whose vectors are a loss

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """True if `path` looks like this format; runs no code from the file.

        Raises:
            UnreadableSource: a file of this kind that is malformed.
        """

    def replaces(self, path: Path) -> bool:
        """True if `path` holds this format for certain, so that it may be written over."""
        try:
            return self.recognises(path)
        except UnreadableSource:
            return False

    @abstractmethod
    def contents(self, path: Path) -> dict[str, Any]:
        """What the files contain, as plain JSON values for `inspect`; needs no options.

        Raises:
            UnreadableSource: the files are malformed.
        """

    @abstractmethod
    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        """Read the files as a steering package.

        Raises:
            UnreadableSource: the files are malformed.
            MissingOption: an option without a default was not given.
            NotRepresentable: the files contain something that a package cannot represent.
        """

    @abstractmethod
    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        """Write the parts of `package` that this format can represent to the new path `path`.

        Raises:
            NotRepresentable: one of these parts has a value that the format cannot represent.
        """

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        """Answers, beside those of `write`, with which `read` takes all of what `write` wrote as it
        stands there."""
        return {}

    def losses(self, package: SteeringPackage, answers: Answers) -> list[Loss]:
        """What `write` would leave out or change.

        Raises:
            NotRepresentable: nothing of the package would remain.
        """
        return list(losses(package, self.holds, self.name))


def losses(package: SteeringPackage, holds: Holds, name: str) -> Iterator[Loss]:
    """The losses that follow from what a format can represent."""
    spec = package.spec
    kept = {i.id for i in spec.interventions if i.type in holds.interventions}
    probes = {p.id for p in spec.probes if p.type in holds.probes}
    if not kept and not probes:
        raise NotRepresentable(name, "no part of this package: " + _kinds(package))
    for probe in spec.probes:
        if probe.id in probes and probe.token_reading is not None and not holds.token_readings:
            raise NotRepresentable(name, f"probe {probe.id}: {probe.token_reading}")
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
                "also acts on the tokens of the prompt, not only from its end on",
            )
    for rule in spec.rules:
        yield from _rule_losses(rule, kept, probes, holds)
    if spec.calibrations and not holds.records and probes:
        yield Loss("calibrations", "are dropped: the threshold is the one for transformers")


def _rule_losses(rule: Rule, kept: set[str], probes: set[str], holds: Holds) -> Iterator[Loss]:
    acting = [id for id in rule.interventions if id in kept]
    if not acting:
        return
    names = ", ".join(acting)
    if rule.condition is not None:
        missing = [id for id in rule.condition.probes if id not in probes]
        if not holds.gates:
            yield Loss(f"rule {rule.id}", f"is dropped: {names} will act on every prompt")
        elif missing:
            yield Loss(
                f"rule {rule.id}",
                f"no longer depends on {', '.join(missing)}: {names} will act on other prompts",
            )
    if not isinstance(rule.strength, ConstantStrength) and not holds.records:
        yield Loss(
            f"rule {rule.id}",
            f"its strength no longer follows a score: {names} will act at full strength",
        )


def _kinds(package: SteeringPackage) -> str:
    parts = (*package.spec.probes, *package.spec.interventions)
    return ", ".join(f"{p.id} ({p.type})" for p in parts) or "it holds nothing"


def unreadable(path: Path, field: str, want: str, got: object) -> UnreadableSource:
    """The error for a malformed file; what was found is told in a few words, however large."""
    return UnreadableSource(Problem(field, want, str(got)[:MOST_TOLD]), path)


def require_known(
    format: str,
    where: str,
    fields: Iterable[str],
    known: Collection[str],
    prefixes: tuple[str, ...] = (),
) -> None:
    """Refuse fields that are not known: each may change what the rest of a file means.

    Args:
        prefixes: beginnings of fields that describe and change nothing.

    Raises:
        NotRepresentable: there are some.
    """
    unknown = sorted(f for f in fields if f not in known and not f.startswith(prefixes))
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        names = ", ".join(name[:60] for name in unknown[:4])
        raise NotRepresentable(
            format, f"{where}: {names}{more}: unknown, and may change what the file means"
        )


def shown(value: object) -> str:
    """A value of a foreign file in a few words. Its `repr` may be larger than any memory: a list
    may hold the same list many times."""
    return _SHORT.repr(value)


_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 4, 4, 4
MOST_TOLD: Final = 400  # characters


# ---------------------------------------------------------------- by name and by file


@cache
def formats() -> dict[str, Format]:
    """Every installed format by name, sorted."""
    installed: dict[str, Format] = {}
    for entry in registry.entries("formats").values():
        try:
            format: Format = entry.load()()
        except Exception as error:  # a faulty package must not take the other formats with it
            warnings.warn(f"format {entry.name} cannot be loaded: {error!r}", stacklevel=2)
        else:
            installed[format.name] = format
    return dict(sorted(installed.items()))


def get_format(name: str) -> Format:
    """The format with this name.

    Raises:
        UnknownFormat: no installed format has it.
    """
    try:
        return formats()[name]
    except KeyError:
        raise UnknownFormat(f"no format is called {name!r}", tuple(formats())) from None


_POINTER: Final = b"version https://git-lfs"


def check_source(path: Path) -> None:
    """Refuse what is no artifact but leads to one: a pointer of git-lfs, and a directory with links
    out of it, which would read files that whoever packed it has no right to. (A snapshot of the hub
    may link to the blobs beside it; a link that the user names is the user's.)

    Raises:
        UnreadableSource: as said.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise unreadable(
                    path, "file", "its content", "a pointer of git-lfs (`git lfs pull` fetches it)"
                )
        return
    root = path.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            item = Path(folder) / name
            if item.is_symlink() and not any(item.resolve().is_relative_to(h) for h in homes):
                raise unreadable(path, str(item.relative_to(root)), "a file", "a link out of here")


def detect(path: Path) -> Format:
    """The one format that recognises `path`.

    Raises:
        FileNotFoundError: `path` does not exist.
        UnreadableSource: see `check_source`; or no format recognises it, for it is malformed.
        UnknownFormat: no format recognises it, or several do; the user must name one.
    """
    if not path.exists():
        raise FileNotFoundError(f"nothing to convert at {path}")
    check_source(path)
    matches: list[Format] = []
    malformed: list[UnreadableSource] = []
    for format in formats().values():
        try:
            matches += [format] if format.recognises(path) else []
        except UnreadableSource as error:
            malformed.append(error)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UnknownFormat(
            f"several formats match {path}; name one with --from", [f.name for f in matches]
        )
    if malformed:
        raise malformed[0]
    raise UnknownFormat(f"no known format matches {path}; name one with --from", tuple(formats()))
