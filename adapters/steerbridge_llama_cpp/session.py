"""A package attached to one `llama_cpp.Llama`: where its requests begin and end.

The road of one request: `generate` says that a prompt comes (`request`); the first `eval` opens
it with the number of rows that the KV cache holds already; every batch passes through
`SteeredContext.decode`; at the prompt end the outcome is kept and told. A prompt with images
comes in chunks, its length announced before the first (see `media.py`). Nothing here patches
llama_cpp: the session gives one object another context and a subclass of its class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
from llama_cpp import _internals as internals

from steerbridge.errors import RowMappingLost, SteeredCache, SteeringFailed, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Attachment, Outcome
from steerbridge.spec import HeadMatrix, PromptEnd
from steerbridge_llama_cpp.context import SteeredContext, set_lora
from steerbridge_llama_cpp.native import RUNTIME

OnOutcome = Callable[[tuple[Outcome, ...]], None]


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """One `generate()` under way, and the tokens of its prompt that are to be evaluated."""

    tokens: list[int]


class Session(Attachment):
    """Steers every request of one `Llama`. `apply` and `remove` are inverses, and idempotent."""

    def __init__(
        self,
        llama: llama_cpp.Llama,
        package: SteeringPackage,
        ignore: Collection[str] = (),
        on_outcome: OnOutcome | None = None,
    ) -> None:
        self.llama: Any = llama
        self.package = package
        self.unchecked: tuple[str, ...] = ()
        self.outcomes: tuple[Outcome, ...] = ()
        """What was decided for the last prompt that ended (one, or none yet)."""
        self._ignore = ignore
        self._on_outcome = on_outcome
        self._reach = _Reach(package)
        self._context: SteeredContext | None = None
        self._current: Running | None = None
        self._expected = False  # its next eval holds its prompt
        self._prompt = 0  # rows of the open prompt; 0: no request is open
        self._told = True
        self._announced = 0  # rows of a prompt that will come in chunks; 0: none
        self._in_chunks = False  # the open prompt came so
        self._image_row: int | None = None  # first row in the cache that no token id stands for

    # -------------------------------------------------------- attach and detach

    def apply(self) -> None:
        """Attach. The KV cache starts empty. Does nothing when attached."""
        from steerbridge_llama_cpp.llama import steered_class

        if self._context is not None:
            return
        if self.llama.__dict__.get("steering_session") is not None:
            raise UnsupportedFeature(RUNTIME, "this Llama is steered already", "remove() first")
        if self._reach.layers and self.llama.cache is not None:
            raise UnsupportedFeature(RUNTIME, _NO_STATE_CACHE, "set_cache(None) first")
        self._context = self._replace_context(steered=True)
        self.unchecked, self.package = self._context.unchecked, self._context.package
        self.llama.__class__ = steered_class(type(self.llama))
        self.llama.steering_session = self

    def remove(self) -> None:
        """Detach: the `Llama` is an ordinary one, with an empty KV cache. Idempotent."""
        from steerbridge_llama_cpp.llama import plain_class

        if self._context is None:
            return
        self._context = None
        del self.llama.__dict__["steering_session"]
        self.llama.__class__ = plain_class(type(self.llama))
        self._replace_context(steered=False)

    def _replace_context(self, *, steered: bool) -> Any:
        llama = self.llama
        llama._ctx.close()
        llama.n_tokens = 0  # its cache went, whatever follows
        llama._requires_eval = True
        try:
            context = self._new_context(steered)
        except Exception:
            llama._ctx = self._new_context(False)  # leave something that works
            raise
        llama._ctx = llama._stack.enter_context(contextlib.closing(context))
        return context

    def _new_context(self, steered: bool) -> Any:
        llama = self.llama
        options = {
            "model": llama._model,
            "params": llama.context_params,
            "verbose": llama.verbose,
        }
        context = (
            SteeredContext(
                self.package,
                ignore=self._ignore,
                after_batch=self._tell,
                keep_rows=self._reach.whole and bool(self.package.spec.rules),
                **options,
            )
            if steered
            else internals.LlamaContext(**options)
        )
        if llama._lora_adapter is not None:
            set_lora(context, llama._lora_adapter, llama.lora_scale)
        return context

    @property
    def context(self) -> SteeredContext:
        """The Llama's context.

        Raises:
            UnsupportedFeature: not attached.
        """
        if self._context is None:
            raise UnsupportedFeature(RUNTIME, "the package is not attached", "apply() first")
        return self._context

    # -------------------------------------------------------- what Llama's methods call

    @contextlib.contextmanager
    def request(self, tokens: Sequence[int], reset: bool) -> Iterator[Running]:
        """One `generate()`: its next `eval` is the rest of its prompt.

        While it runs, rows behind the prompt may come several at a time (drafts). A generator
        that was left behind changes nothing of a later one, whenever it is closed.
        """
        held = reset and self._holds(tokens)
        self._announced = 0
        running = self._current = Running(list(tokens) if held else self._rest(tokens, reset))
        self._expected = not held
        try:
            yield running
        finally:
            if self._current is running:
                self._current, self._expected = None, False

    def check(self, running: Running) -> None:
        """Raise RowMappingLost if another `generate()` has taken the cache since."""
        if self._current is not running:
            raise RowMappingLost(
                "another generate() started on this Llama, so its cache holds other rows; "
                "finish one before the next"
            )

    def _holds(self, tokens: Sequence[int]) -> bool:
        """True if the cache holds this prompt, which came in chunks and was decided on."""
        llama = self.llama
        return (
            self._in_chunks
            and self._told
            and not self.context.failed
            and not llama._requires_eval
            and llama.n_tokens == self._prompt
            and llama.input_ids[: self._prompt].tolist() == list(tokens)
        )

    def _rest(self, tokens: Sequence[int], reset: bool) -> list[int]:
        """The tokens to evaluate of a prompt.

        Cuts the cache back so that every row that a probe reads will be evaluated or was kept,
        no row that an earlier request steered at a layer is used again, and no image is taken
        for text.
        """
        llama = self.llama
        if self.context.failed:
            self.recover()
        given = list(tokens)
        if not reset and self._holds_images():
            raise RowMappingLost("the cache holds images; give the whole prompt, not its end")
        whole = given if reset else [*llama.input_ids[: llama.n_tokens].tolist(), *given]
        keep = self._reach.cacheable(len(whole), self.context.native.kept_rows(0))
        if (steered := self.context.native.first_steered(0)) is not None:
            keep = min(keep, steered)
        if self._image_row is not None:
            keep = min(keep, self._image_row)
        if llama.n_tokens > keep:
            if llama._is_recurrent or llama._is_hybrid:
                keep = 0  # their state cannot be cut
                llama.reset()
            llama.n_tokens = keep
            llama._requires_eval = True
        return given if reset else whole[llama.n_tokens :]

    def before_eval(self, rows: int) -> None:
        """Open the request that the coming rows start, or refuse rows of no request."""
        if self.context.failed:
            raise SteeringFailed("the last request failed; reset() before the next")
        cached: int = self.llama.n_tokens
        if rows == 0 and self._in_chunks and not self._expected:
            return  # generate() of a prompt that the cache holds
        if self._expected or cached == 0:
            self._open(cached, cached + rows)
        elif self._in_chunks and cached + rows <= self._prompt:
            return  # the next chunk
        elif not 0 < self._prompt <= cached:
            raise RowMappingLost(
                f"{rows} rows behind {cached} cached ones belong to no known request; "
                "use generate() or reset()"
            )
        elif rows != 1 and self._current is None:
            raise RowMappingLost(
                f"eval of {rows} tokens behind a prompt may be a new turn; use generate()"
            )

    def _open(self, cached: int, rows: int) -> None:
        self._expected = False
        self._prompt, self._told, self.outcomes = 0, False, ()
        if self._image_row is not None and cached <= self._image_row:
            self._image_row = None
        self._in_chunks, total = self._announced > 0, self._announced or rows
        self._announced = 0
        self.context.begin(0, cached, total)
        self._prompt = total

    # -------------------------------------------------------- prompts in chunks

    def announce(self, rows: int) -> None:
        """The next rows on an empty cache start a prompt of so many, in several chunks."""
        self._announced = rows

    @contextlib.contextmanager
    def media(self) -> Iterator[None]:
        """While a prompt in chunks is evaluated: if that fails halfway, nothing of it stays."""
        try:
            yield
        finally:
            self._announced = 0
            if self._in_chunks and self.llama.n_tokens < self._prompt:
                self.recover()

    def decode_media(self, rows: int, image: bool, decode: Callable[[], int]) -> int:
        """Have `decode` put rows into the cache that no token ids stand for; returns its code.

        Raises:
            UnsupportedFeature: more rows than a batch holds, in batches that micro-batches do
                not divide.
        """
        size, part = self.llama.n_batch, llama_cpp.llama_n_ubatch(self.context.ctx)
        if rows > size and size % part:
            raise UnsupportedFeature(
                RUNTIME, f"an image of {rows} rows with n_batch {size}, n_ubatch {part}", "n_batch"
            )
        self.before_eval(rows)
        if self._image_row is None:
            self._image_row = self.llama.n_tokens
        return self.context.decode_elsewhere(rows, image, decode)

    def _holds_images(self) -> bool:
        return self._image_row is not None and self._image_row < self.llama.n_tokens

    # -------------------------------------------------------- recovery and refusals

    def recover(self) -> None:
        """Forget a failed request: empty cache, no open request."""
        self.context.recover()
        self._prompt = 0
        self.llama.n_tokens = 0
        self.llama._requires_eval = True

    def loaded(self) -> None:
        """A saved state replaced the cache: its rows belong to no open request."""
        self.context.forget()
        self._prompt = 0

    def refuse_steered_cache(self) -> None:
        """Raise SteeredCache if the KV cache must not serve later requests from a saved state."""
        if self._holds_images():
            raise SteeredCache("the KV cache holds images, which a saved state takes for text")
        row = self.context.native.first_steered(0)
        if row is not None and row < self.llama.n_tokens:
            raise SteeredCache(
                f"the KV cache holds rows steered at a layer (from row {row} on); saved, they "
                "would serve requests that are not steered"
            )

    def refuse_state_cache(self) -> None:
        """Raise UnsupportedFeature if states of this session must not be kept for others."""
        if self._reach.layers:
            raise UnsupportedFeature(RUNTIME, _NO_STATE_CACHE)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work on the context that generates nothing (embeddings)."""
        if self.context.failed:
            self.recover()
        self._prompt = 0
        with self.context.paused():
            yield

    def _tell(self) -> None:
        """Keep and report the outcome once the prompt has ended; called after each batch."""
        if self._told or (found := self.context.outcome(0)) is None:
            return
        self._told, self.outcomes = True, (found,)
        if self._on_outcome is not None:
            self._on_outcome(self.outcomes)


_NO_STATE_CACHE = (
    "a cache of saved states, with a package that steers at layers: its states would carry "
    "steered rows to other requests"
)


class _Reach:
    """Which rows of a prompt a package reads, and whether it writes before the head."""

    def __init__(self, package: SteeringPackage) -> None:
        spec = package.spec
        positions = [r.position for p in spec.probes for r in p.readings]
        self.whole = any(not isinstance(p, PromptEnd) for p in positions)
        self._offset = min((p.offset for p in positions if isinstance(p, PromptEnd)), default=0)
        self.layers = any(not isinstance(x, HeadMatrix) for x in spec.interventions)

    def cacheable(self, prompt: int, kept: int) -> int:
        """How many rows of a prompt may come from the cache: no probe reads them, or what it
        reads of them was kept."""
        if self.whole:
            return min(kept, prompt - 1)
        return max(0, prompt - 1 + self._offset)
