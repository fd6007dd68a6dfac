"""Attaches the package when the server's service is created.

`TextGenerationService(model, cache, urls)` is the one place where the final model and the cache of
batches are both known, before warm-up captures CUDA graphs. An error here ends the shard before its
socket exists, so an unsteered server never answers.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Final

from steerbridge import imports

SERVER: Final = "text_generation_server.server"


def install() -> None:
    """Watch for the import of the server; no effect in a process that never imports it.

    Raises:
        ValueError: STEERBRIDGE_PACKAGE names no package.
    """
    imports.watch({SERVER: wrap})


def wrap(server: Any) -> None:
    """Make the service of `text_generation_server.server` attach the package."""
    service = getattr(server, "TextGenerationService", None)
    if service is None:
        reason = "has no TextGenerationService: this version of the server is not known"
        imports.end(f"{SERVER} {reason}")
    original = service.__init__

    @functools.wraps(original)
    def init_and_attach(self: Any, model: Any, cache: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model, cache, *args, **kwargs)
        # Imported late because it imports torch.
        from steerbridge_tgi.attach import attach

        attach(self, os.environ["STEERBRIDGE_PACKAGE"])

    service.__init__ = init_and_attach
