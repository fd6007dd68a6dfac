"""A package attached to one `llama_cpp.Llama`.

The session gives the `Llama` another context and a subclass of its class; llama_cpp itself is
not patched. The requests are followed by a `RequestTracker` (see `_tracker.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any, Final

import llama_cpp
from llama_cpp import _internals as internals

from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Attachment, Outcome
from steerbridge_llama_cpp._mixin import steered_class, unsteered_class
from steerbridge_llama_cpp._tracker import OnOutcome, RequestTracker
from steerbridge_llama_cpp.context import SteeredContext, set_lora
from steerbridge_llama_cpp.native import RUNTIME

ADDED: Final = ("steering_session", "_steering_tracker")
"""Attributes that a session adds to its `Llama`."""


class Session(Attachment):
    """Steers every request of one `Llama`. `apply` and `remove` are inverses, and idempotent.

    Attributes are those of `steerbridge.runtime.Attachment`. A `Llama` runs one request at a
    time, so `current` belongs to its `generate()` call, in whichever thread that runs.
    `between_batches` is called after every batch; what it raises ends the request.
    """

    between_batches: Callable[[], None] | None = None

    def __init__(
        self,
        llama: llama_cpp.Llama,
        package: SteeringPackage,
        ignore: Collection[str] = (),
        on_outcome: OnOutcome | None = None,
    ) -> None:
        self._llama: Any = llama
        self._package = package
        self._unchecked: tuple[str, ...] = ()
        self._ignore = ignore
        self._tracker = RequestTracker(llama, package, on_outcome)

    @property
    def package(self) -> SteeringPackage:
        return self._package

    @property
    def unchecked(self) -> tuple[str, ...]:
        return self._unchecked

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return self._tracker.outcomes

    @property
    def current(self) -> Outcome | None:
        return self._tracker.current

    def apply(self) -> None:
        """Attach. The KV cache starts empty. Does nothing when attached."""
        if self._tracker.attached:
            return
        if self._llama.__dict__.get("steering_session") is not None:
            raise UnsupportedFeature(RUNTIME, "this Llama is steered already", "remove() first")
        if self._llama.cache is not None:
            self._tracker.refuse_state_cache("set_cache(None) first")
        context = self._replace_context(steered=True)
        self._unchecked, self._package = context.unchecked, context.package
        self._tracker.attach(context)
        self._llama.__class__ = steered_class(type(self._llama))
        for name, value in zip(ADDED, (self, self._tracker), strict=True):
            setattr(self._llama, name, value)

    def remove(self) -> None:
        """Detach: the `Llama` is an ordinary one, with an empty KV cache. Idempotent."""
        if not self._tracker.attached:
            return
        self._tracker.detach()
        for name in ADDED:
            del self._llama.__dict__[name]
        self._llama.__class__ = unsteered_class(type(self._llama))
        self._replace_context(steered=False)

    def _replace_context(self, *, steered: bool) -> Any:
        llama = self._llama
        llama._ctx.close()
        llama.n_tokens = 0  # the KV cache is gone, even if what follows fails
        llama._requires_eval = True
        try:
            context = self._new_context(steered)
        except Exception:
            llama._ctx = self._new_context(False)  # leave a Llama that works
            raise
        llama._ctx = llama._stack.enter_context(contextlib.closing(context))
        return context

    def _after_batch(self) -> None:
        self._tracker.after_batch()
        if self.between_batches is not None:
            self.between_batches()

    def _new_context(self, steered: bool) -> Any:
        llama = self._llama
        options = {
            "model": llama._model,
            "params": llama.context_params,
            "verbose": llama.verbose,
        }
        context = (
            SteeredContext(
                self._package,
                ignore=self._ignore,
                after_batch=self._after_batch,
                keep_rows=self._tracker.keeps_rows,
                **options,
            )
            if steered
            else internals.LlamaContext(**options)
        )
        if llama._lora_adapter is not None:
            set_lora(context, llama._lora_adapter, llama.lora_scale)
        return context
