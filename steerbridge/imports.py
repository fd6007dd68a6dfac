"""Waits for modules of a server to be imported, and then hands them over to be wrapped.

Whoever loads such a module, the import system or another, executes its code; an audit hook sees
that, and ends the process if the module was not loaded by us: it would run unguarded. This imports
the standard library alone, as it runs at the start of every process of an environment.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, Final, NoReturn

Wrap = Callable[[Any], None]

UNGUARDED: Final = 78  # exit code: nothing was answered, because it would not have been guarded
_loading = threading.local()  # `ours`: modules that this thread executes for us
_wraps: dict[str, Wrap] = {}


def watch(modules: Mapping[str, Wrap]) -> None:
    """Call a function with each of these modules, each time that it was executed.

    Raises:
        ValueError: STEERBRIDGE_PACKAGE names no package.
    """
    if not os.environ["STEERBRIDGE_PACKAGE"].strip():
        raise ValueError("STEERBRIDGE_PACKAGE: expected the path of a package, found nothing")
    if not _wraps:
        sys.meta_path.insert(0, _Finder())
        sys.addaudithook(_audit)
    _wraps.update(modules)


def ignored() -> list[str]:
    """Fields of the base model that may differ: STEERBRIDGE_IGNORE, with commas between."""
    return [name for name in os.environ.get("STEERBRIDGE_IGNORE", "").split(",") if name]


def end(reason: str) -> NoReturn:
    """End the process. No exception: somebody might catch it."""
    sys.stderr.write(f"steerbridge: {reason}\n")
    sys.stderr.flush()
    os._exit(UNGUARDED)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "exec" or not isinstance(arguments[0], CodeType):
        return
    path = arguments[0].co_filename.replace(os.sep, "/")
    if arguments[0].co_name != "<module>" or not path.endswith(".py"):
        return
    ours = getattr(_loading, "ours", ())
    for name in _wraps:
        if name not in ours and path.endswith("/" + name.replace(".", "/") + ".py"):
            end(f"{path} was loaded past the hook that attaches the package")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules as the other finders do, each time that one is asked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _wraps:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Another loader, and what must be done when the module was executed."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._real.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        before = getattr(_loading, "ours", ())
        _loading.ours = (*before, module.__name__)
        try:
            self._real.exec_module(module)
        finally:
            _loading.ours = before
        _wraps[module.__name__](module)
