"""Waits for the server's module, and attaches the package when its service is created.

`TextGenerationService(model, cache, urls)` is the one place where the final model (LoRA loaded) and
the cache of batches are both known, before warm-up captures CUDA graphs. An error here ends the
shard before its socket exists, so an unsteered server never answers.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

SERVER: Final = "text_generation_server.server"


def install() -> None:
    """Watch for the import of the server; no effect in a process that never imports it."""
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002 - as importlib calls it
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if name != SERVER:
            return None
        sys.meta_path.remove(self)  # the other finders load it
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, real: Any) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._real.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        wrap(module)


def wrap(server: Any) -> None:
    """Make the service of `text_generation_server.server` attach the package."""
    service = server.TextGenerationService
    original = service.__init__

    @functools.wraps(original)
    def init_and_attach(self: Any, model: Any, cache: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model, cache, *args, **kwargs)
        # Imported late because it imports torch.
        from steerbridge_tgi.attach import attach

        attach(self, os.environ["STEERBRIDGE_PACKAGE"])

    service.__init__ = init_and_attach
