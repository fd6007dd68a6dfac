"""Wraps what a package needs of vLLM, in each of its processes, when its modules are imported.

Workers attach the package to their models; the scheduler passes verdicts on, and keeps prefixes
from being reused too far; outputs carry verdicts to whoever asked. A name that is not there ends
the process: this version of vLLM is not known.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

from steerbridge import imports
from steerbridge_vllm import transport


def install() -> None:
    """Watch for vLLM's modules; no effect in a process that never imports them.

    Raises:
        ValueError: STEERBRIDGE_PACKAGE names no package.
    """
    imports.watch({name: functools.partial(_wrap, name, wrap) for name, wrap in _WRAPS.items()})


def _wrap(name: str, wrap: Callable[[Any], None], module: Any) -> None:
    try:
        wrap(module)
    except AttributeError as error:
        imports.end(f"{name}: this version of vLLM is not known: {error}")


def _worker(module: Any) -> None:
    """Attach the package around the loading of a model: before compilation and capture."""
    worker = module.Worker
    original = worker.load_model

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Imported late because it imports torch.
        from steerbridge_vllm import attach

        packages = attach.before_loading(self)
        result = original(self, *args, **kwargs)
        self.steerbridge = attach.after_loading(self, packages)
        return result

    worker.load_model = load_model


def _caches(module: Any) -> None:
    """Let no prefix that is taken from the cache hold a row that a probe reads by itself."""
    manager = module.KVCacheManager
    original = manager.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Imported late because it imports numpy.
        from steerbridge_vllm import given

        original(self, *args, **kwargs)
        back = max(given.reaches_back(one.spec) for one in given.packages().values())
        find = self.coordinator.find_longest_cache_hit

        def find_longest_cache_hit(hashes: Any, longest: int) -> Any:
            return find(hashes, max(0, longest - back))

        if back:
            self.coordinator.find_longest_cache_hit = find_longest_cache_hit

    manager.__init__ = init


def _inputs(module: Any) -> None:
    """Refuse requests that ask for a package that is not there."""
    processor = module.InputProcessor
    original = processor.process_inputs
    signature = inspect.signature(original)
    if "params" not in signature.parameters:
        raise AttributeError("process_inputs takes no params")

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Imported late because it imports numpy.
        from steerbridge_vllm import given

        try:
            given.name_in(signature.bind(self, *args, **kwargs).arguments["params"])
        except ValueError as error:  # in vLLM's words, which its server answers with 400
            raise module.VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return original(self, *args, **kwargs)

    processor.process_inputs = process_inputs


def _engine(module: Any) -> None:
    """See `http.wrap_engine`; imported late, as it imports numpy."""
    from steerbridge_vllm import http

    http.wrap_engine(module)


def _app(module: Any) -> None:
    """See `http.wrap_app`."""
    from steerbridge_vllm import http

    http.wrap_app(module)


_WRAPS: Final[dict[str, Callable[[Any], None]]] = {
    "vllm.v1.worker.gpu_worker": _worker,
    "vllm.v1.core.kv_cache_manager": _caches,
    "vllm.v1.core.sched.scheduler": transport.wrap_scheduler,
    "vllm.v1.engine.output_processor": transport.wrap_outputs,
    "vllm.outputs": transport.wrap_merging,
    "vllm.v1.engine.input_processor": _inputs,
    "vllm.v1.engine.async_llm": _engine,
    "vllm.entrypoints.launchers.app": _app,
}
