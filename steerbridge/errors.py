"""Every error Steerbridge raises on purpose, as one tree.

SteerbridgeError
├── PackageError               a steering package cannot be used
│   ├── BrokenPackage          malformed, truncated or hostile file: export it again
│   ├── UnsupportedVersion     written to a newer contract: upgrade steerbridge
│   └── InvalidSpec            the spec or a tensor breaks a rule of the format
├── ModelMismatch              the package was made for another model
├── UnsupportedFeature         this runtime or mode cannot do what the package asks
├── RuntimeMissing             an extra is not installed (also an ImportError)
├── SteeringFailed             steering could not be guaranteed, so generation stopped
│   ├── RowMappingLost         a row of the batch cannot be tied to a request
│   ├── HookLost               a hook did not run when it had to
│   └── SteeredCache           a KV cache holds steered states of another request
├── ConversionError            an artifact cannot be converted
│   ├── UnknownFormat          no format matches the files, or several do
│   ├── UnreadableSource       a file is malformed
│   ├── MissingOption          a value that the files do not contain was not given
│   ├── InvalidOption          an option is unknown, or its value is not valid
│   ├── NotReadBack            what was written does not act as the package
│   ├── NotRepresentable       the format has no counterpart for a part
│   └── WouldLose              the target cannot represent everything; needs permission
├── EndpointFailed             a server that was asked for answers gave none
└── DataError                  prompts, datasets or captured arrays are unusable

Errors carry data; the message is built from it. Branch on attributes, read the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class SteerbridgeError(Exception):
    """Root of the tree; the CLI turns it into one line and an exit code."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule: where, what was expected, what was found."""

    field: str
    want: str
    got: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.want}, found {self.got}"


class PackageError(SteerbridgeError):
    """A steering package cannot be used. `path` is None for a package in memory."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class BrokenPackage(PackageError):
    """The bytes are not a well-formed package. `problem` names the broken part."""

    def __init__(self, problem: Problem, path: Path | None = None) -> None:
        super().__init__(str(problem), path)
        self.problem = problem


class UnsupportedVersion(PackageError):
    """The package follows a contract this version does not know."""

    def __init__(self, got: str, supported: str, path: Path | None = None) -> None:
        super().__init__(
            f"spec_version {got} is not supported (this steerbridge reads {supported}); "
            "upgrade steerbridge",
            path,
        )
        self.got = got
        self.supported = supported


class InvalidSpec(PackageError):
    """The spec or its tensors break rules of the format; `problems` lists every one."""

    def __init__(self, problems: Sequence[Problem], path: Path | None = None) -> None:
        super().__init__("; ".join(map(str, problems)), path)
        self.problems = tuple(problems)


class ModelMismatch(SteerbridgeError):
    """The model in hand is not the one the package was made for."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("the package does not fit this model: " + "; ".join(map(str, problems)))
        self.problems = tuple(problems)


class UnsupportedFeature(SteerbridgeError):
    """A runtime, model or mode cannot do what was asked; refused before the first token."""

    def __init__(self, runtime: str, what: str, instead: str = "") -> None:
        super().__init__(f"{runtime}: {what}" + (f"; {instead}" if instead else ""))
        self.runtime = runtime
        self.what = what
        self.instead = instead


class RuntimeMissing(SteerbridgeError, ImportError):
    """A package that an optional part needs is not installed. `command` installs it."""

    def __init__(
        self, name: str, extra: str, distribution: str = "steerbridge", reason: str = ""
    ) -> None:
        ours = name if distribution == "steerbridge" else distribution  # no extra has it
        target = f"{distribution}[{extra}]" if extra else ours
        self.command = f"pip install '{target}'"
        what = f"{name} cannot be used ({reason})" if reason else f"{name} is not installed"
        super().__init__(f"{what}; run: {self.command}")
        self.name = name
        self.extra = extra
        self.distribution = distribution


class SteeringFailed(SteerbridgeError):
    """Steering could not be guaranteed for a request; no further token was produced."""


class RowMappingLost(SteeringFailed):
    """A row of the batch cannot be tied to a request and position with certainty."""


class HookLost(SteeringFailed):
    """A probe or head hook did not run although the request needed it."""


class SteeredCache(SteeringFailed):
    """A KV cache that holds steered hidden states was given to another request."""


class EndpointFailed(SteerbridgeError):
    """A server that was asked for answers cannot be reached, or answered with an error."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url = url


class DataError(SteerbridgeError):
    """Prompts, datasets or captured arrays cannot be used. `path` names the file, if any."""

    def __init__(self, problem: Problem, path: Path | None = None) -> None:
        super().__init__(f"{path}: {problem}" if path else str(problem))
        self.problem = problem
        self.path = path


class ConversionError(SteerbridgeError):
    """An artifact of one format cannot be turned into another."""


class UnknownFormat(ConversionError):
    """No format matches, or several do; `known` lists the names to choose from."""

    def __init__(self, what: str, known: Sequence[str]) -> None:
        super().__init__(f"{what}; formats: {', '.join(known)}")
        self.known = tuple(known)


class UnreadableSource(ConversionError):
    """A file is malformed. `problem` names the broken part."""

    def __init__(self, problem: Problem, path: Path) -> None:
        super().__init__(f"{path}: {problem}")
        self.problem = problem
        self.path = path


class MissingOption(ConversionError):
    """The files do not contain `option` and it was not given; guessing could invert the meaning."""

    def __init__(self, format: str, option: str, help: str) -> None:
        flag = f"--{option}" if option in ("base", "model") else f"--set {option}="
        super().__init__(
            f"{format}: {option} is not in the files and guessing wrong could invert the meaning; "
            f"give {flag} ({help})"
        )
        self.format = format
        self.option = option


class InvalidOption(ConversionError):
    """`option` is unknown to `format`, or its value is not valid."""

    def __init__(self, format: str, option: str, reason: str) -> None:
        super().__init__(f"{format}: option {option}: {reason}")
        self.format = format
        self.option = option


class NotRepresentable(ConversionError):
    """`format` has no counterpart for a part of the artifact."""

    def __init__(self, format: str, reason: str) -> None:
        super().__init__(f"{format} cannot represent this: {reason}")
        self.format = format
        self.reason = reason


class NotReadBack(ConversionError):
    """What was written does not act as the package does; it was not put into place."""

    def __init__(self, format: str, reason: str) -> None:
        super().__init__(f"{format}: what was written does not read back as the package: {reason}")
        self.format = format
        self.reason = reason


class WouldLose(ConversionError):
    """The target cannot represent everything; nothing was written. `losses` lists what."""

    def __init__(self, format: str, losses: Sequence[object]) -> None:
        lines = "".join(f"\n  - {loss}" for loss in losses)
        super().__init__(
            f"{format} cannot represent everything (--allow-loss writes it anyway):{lines}"
        )
        self.format = format
        self.losses = tuple(losses)
