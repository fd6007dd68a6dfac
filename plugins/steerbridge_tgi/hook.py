"""Waits for the server's module, and attaches the package when its service is created.

`TextGenerationService(model, cache, urls)` is the one place where the final model and the cache of
batches are both known, before warm-up captures CUDA graphs. An error here ends the shard before its
socket exists, so an unsteered server never answers.

Whoever loads the server's module, the import system or another, executes its code; an audit hook
sees that and ends the process if the module was not loaded by us.
"""

from __future__ import annotations

import functools
import importlib.abc
import os
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, Final, NoReturn

SERVER: Final = "text_generation_server.server"
UNGUARDED: Final = 78  # exit code: nothing was answered, because it would not have been guarded
_FILE: Final = SERVER.replace(".", "/") + ".py"
_loading = threading.local()  # `ours`: this thread executes the module for us
_installed = False


def install() -> None:
    """Watch for the import of the server; no effect in a process that never imports it.

    Raises:
        ValueError: STEERBRIDGE_PACKAGE names no package.
    """
    global _installed
    if not os.environ["STEERBRIDGE_PACKAGE"].strip():
        raise ValueError("STEERBRIDGE_PACKAGE: expected the path of a package, found nothing")
    if not _installed:
        sys.meta_path.insert(0, _Finder())
        sys.addaudithook(_audit)
        _installed = True


def _end(reason: str) -> NoReturn:
    """No exception: somebody might catch it."""
    sys.stderr.write(f"steerbridge: {reason}\n")
    sys.stderr.flush()
    os._exit(UNGUARDED)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "exec" or getattr(_loading, "ours", False):
        return
    code = arguments[0]
    if isinstance(code, CodeType) and code.co_filename.replace(os.sep, "/").endswith(_FILE):
        _end(f"{code.co_filename} was loaded past the hook that attaches the package")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the server's module as the other finders do, each time that it is asked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != SERVER:
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
        _loading.ours = True
        try:
            self._real.exec_module(module)
        finally:
            _loading.ours = False
        wrap(module)


def wrap(server: Any) -> None:
    """Make the service of `text_generation_server.server` attach the package."""
    service = getattr(server, "TextGenerationService", None)
    if service is None:
        _end(f"{SERVER} has no TextGenerationService: this version of the server is not known")
    original = service.__init__

    @functools.wraps(original)
    def init_and_attach(self: Any, model: Any, cache: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model, cache, *args, **kwargs)
        # Imported late because it imports torch.
        from steerbridge_tgi.attach import attach

        attach(self, os.environ["STEERBRIDGE_PACKAGE"])

    service.__init__ = init_and_attach
