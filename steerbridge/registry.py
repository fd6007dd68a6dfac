"""What other packages add to Steerbridge, and how it is imported: late, and with a clear error.

An entry point names a small object that says where the real thing is (`Deferred`), so listing
commands or runtimes imports nothing heavy. Groups: `steerbridge.runtimes`, `.formats`,
`.commands`, `.functions` (functions that `import steerbridge` offers) and `.environments`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, TypeVar

from steerbridge.errors import RuntimeMissing, SteerbridgeError, UnsupportedFeature

DISTRIBUTION: Final = "steerbridge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """An object that is imported when it is first used.

    Args:
        target: `module:attribute`.
        extra: the extra of `distribution` that installs what the module imports; empty: none.
        distribution: the name to `pip install`; filled in for what an entry point names.
        problem: why the entry point could not be loaded; empty: it could.
    """

    target: str
    extra: str = ""
    distribution: str = DISTRIBUTION
    problem: str = ""

    def load(self) -> Any:
        """Import the object.

        Raises:
            RuntimeMissing: a package that it imports is not installed.
            SteerbridgeError: its entry point could not be loaded.
        """
        if self.problem:
            raise SteerbridgeError(self.problem)
        module, _, attribute = self.target.partition(":")
        with requires(self.extra, self.distribution):
            return getattr(import_module(module), attribute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Deferred):
    """A command of the `steerbridge` program: a function with Typer's annotations.

    Args:
        summary: its line in `steerbridge --help`.
        opens_model: it opens a model in a runtime that the user names, so it needs that
            runtime's extra beside its own.
    """

    summary: str
    opens_model: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime(Deferred):
    """A runtime; its target is a `steerbridge.runtime.Opener`.

    Args:
        engine: `module:attribute` of a `steerbridge.serving.EngineOpener`; empty: it cannot serve.
        name: that of its entry point, which `runtimes` fills in.
    """

    engine: str = ""
    name: str = ""

    def load_engine(self) -> Any:
        """Import the engine's opener.

        Raises:
            UnsupportedFeature: this runtime cannot serve.
            RuntimeMissing: a package that it imports is not installed.
        """
        if not self.engine:
            able = " or ".join(other.name for other in runtimes().values() if other.engine)
            raise UnsupportedFeature(self.name, "serve", able)
        return replace(self, target=self.engine).load()


_Named = TypeVar("_Named", bound=Deferred)


def entries(group: str) -> dict[str, EntryPoint]:
    """Entry points of the group `steerbridge.GROUP` by name, sorted by name."""
    known = entry_points(group=f"steerbridge.{group}")
    return {entry.name: entry for entry in sorted(known, key=lambda entry: entry.name)}


def commands() -> dict[str, Command]:
    """Commands of the `steerbridge` program by name, those of other packages included."""
    return {
        name: _loaded(entry, Command(target=entry.value, summary="cannot be loaded"))
        for name, entry in entries("commands").items()
    }


def runtimes() -> dict[str, Runtime]:
    """Registered runtimes by name. Their dependencies may be missing; `load` raises then."""
    return {
        name: replace(_loaded(entry, Runtime(target=entry.value)), name=name)
        for name, entry in entries("runtimes").items()
    }


def _loaded(entry: EntryPoint, broken: _Named) -> _Named:
    """What an entry point names. If it cannot be loaded, `broken` with the reason: a faulty package
    must not take the whole program with it."""
    distribution = entry.dist.name if entry.dist else DISTRIBUTION
    try:
        value: Any = entry.load()
        if not isinstance(value, type(broken)):
            wanted = f"steerbridge.registry.{type(broken).__name__}"
            raise TypeError(f"expected a {wanted}, found {type(value).__name__}")
    except Exception as error:
        reason = f"{entry.name} of {distribution} cannot be loaded: {error!r}"
        return replace(broken, problem=reason, distribution=distribution)
    return replace(value, distribution=distribution)


def runtime(name: str) -> Runtime:
    """The runtime that is registered under a name.

    Raises:
        SteerbridgeError: there is none; lists the registered ones.
    """
    known = runtimes()
    if name not in known:
        raise SteerbridgeError(f"unknown runtime {name!r}; known: {', '.join(known)}")
    return known[name]


@contextmanager
def requires(extra: str, distribution: str = DISTRIBUTION) -> Iterator[None]:
    """Turn a failed import of somebody else's package into RuntimeMissing.

    A failed import of one of our own modules is a bug and passes through.
    """
    try:
        yield
    except RuntimeMissing:
        raise
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package.startswith(DISTRIBUTION):
            raise
        reason = "" if isinstance(error, ModuleNotFoundError) else str(error)
        raise RuntimeMissing(package, extra, distribution, reason) from error


def lazy(module: str, homes: Mapping[str, str], extra: str = "") -> Callable[[str], Any]:
    """A `__getattr__` (PEP 562) for a package whose names are imported on first use.

    Args:
        module: `__name__` of the package.
        homes: public name -> module that defines it.
        extra: the extra that installs what these modules import.
    """

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = Deferred(target=f"{homes[name]}:{name}", extra=extra).load()
        setattr(sys.modules[module], name, value)
        return value

    return attribute
