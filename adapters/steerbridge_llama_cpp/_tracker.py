"""Where the requests of a steered `llama_cpp.Llama` begin and end.

Request lifecycle: `generate` announces a prompt (`request`); the first `eval` opens the request
with the number of rows that the KV cache holds already; every batch passes through
`SteeredContext.decode`; at the prompt end the outcome is kept and reported. A prompt with images
is evaluated in chunks, its length announced before the first (see `media.py`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp

from steerbridge.errors import RowMappingLost, SteeredCache, SteeringFailed, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.spec import HeadMatrix, PromptEnd, Say
from steerbridge_llama_cpp.context import SteeredContext
from steerbridge_llama_cpp.native import RUNTIME

OnOutcome = Callable[[tuple[Outcome, ...]], None]


@dataclass(frozen=True, slots=True)
class Image:
    """Rows of an image in the cache. With M-RoPE they take fewer positions than rows."""

    start: int  # position
    positions: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A `generate()` call in progress, and the tokens of its prompt that must be evaluated."""

    tokens: list[int]


class RequestTracker:
    """Knows which rows of a `Llama`'s KV cache belong to which request.

    The methods of `Llama` that a session overrides (see `llama.py`) call it.
    """

    def __init__(
        self, llama: llama_cpp.Llama, package: SteeringPackage, on_outcome: OnOutcome | None
    ) -> None:
        self.llama: Any = llama
        self.outcomes: tuple[Outcome, ...] = ()
        """The outcome of the last prompt that ended, and of its answer so far (one, or none)."""
        self.turn = threading.RLock()
        """Held by the thread that uses the Llama's context."""
        self._on_outcome = on_outcome
        self._reach = _Reach(package)
        self.keeps_rows = self._reach.means and bool(package.spec.rules)
        """Whether the context must keep prompt rows for the means of later prompts."""
        self._context: SteeredContext | None = None
        self._running: Running | None = None
        self._expected = False  # the next eval holds the prompt of the running generate()
        self._prompt = 0  # rows of the open prompt; 0: no request is open
        self._reported = True  # the outcome of the open prompt
        self._announced = 0  # rows of a prompt that will come in chunks; 0: none
        self._in_chunks = False  # the open prompt came in chunks
        self._images: list[Image] = []  # in the cache; their rows have no token ids

    # -------------------------------------------------------- attach and detach

    @property
    def attached(self) -> bool:
        return self._context is not None

    def attach(self, context: SteeredContext) -> None:
        """Follow the requests of this context, which the `Llama` has now."""
        self._context = context
        context.row_at = self._row_at

    def detach(self) -> None:
        """Follow no requests."""
        self._context = None

    @property
    def context(self) -> SteeredContext:
        """The Llama's context.

        Raises:
            UnsupportedFeature: not attached.
        """
        if self._context is None:
            raise UnsupportedFeature(RUNTIME, "the package is not attached", "apply() first")
        return self._context

    @property
    def current(self) -> Outcome | None:
        """The outcome of the prompt that `generate()` is answering, once it is known."""
        known = self._running is not None and not self._expected and self._reported
        return self.outcomes[0] if known and self.outcomes else None

    # -------------------------------------------------------- called by the methods of Llama

    @contextlib.contextmanager
    def request(self, tokens: Sequence[int], reset: bool) -> Iterator[Running]:
        """One `generate()` call; the next `eval` holds the rest of its prompt.

        While it runs, several rows behind the prompt may be evaluated at once (drafts). Closing
        an abandoned generator does not affect a later one.
        """
        held = reset and self._holds(tokens)
        self._announced = 0
        running = self._running = Running(list(tokens) if held else self._rest(tokens, reset))
        self._expected = not held
        try:
            yield running
        finally:
            if self._running is running:
                self._running, self._expected = None, False

    def check(self, running: Running) -> None:
        """Raise RowMappingLost if another `generate()` has taken the cache since."""
        if self._running is not running:
            raise RowMappingLost(
                "another generate() started on this Llama, so its cache holds other rows; "
                "finish one before the next"
            )

    def _holds(self, tokens: Sequence[int]) -> bool:
        """True if the cache holds this prompt, evaluated in chunks and decided."""
        llama = self.llama
        return (
            self._in_chunks
            and self._reported
            and not self.context.failed
            and not llama._requires_eval
            and self._rows == self._prompt
            and llama.input_ids[: llama.n_tokens].tolist() == list(tokens)
        )

    def _rest(self, tokens: Sequence[int], reset: bool) -> list[int]:
        """The tokens to evaluate of a prompt.

        Truncates the cache so that every row that a probe reads will be evaluated or was kept,
        no row that an earlier request steered at a layer is reused, and no image is taken for
        text.
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
        if self._images:
            keep = min(keep, self._images[0].start)
        if llama.n_tokens > keep:
            if llama._is_recurrent or llama._is_hybrid:
                keep = 0  # their state cannot be truncated
                llama.reset()
            llama.n_tokens = keep
            llama._requires_eval = True
        return given if reset else whole[llama.n_tokens :]

    def before_eval(self, rows: int) -> None:
        """Open the request that the next rows start, or refuse rows of no request."""
        if self.context.failed:
            raise SteeringFailed("the last request failed; reset() before the next")
        cached = self._rows
        if rows == 0 and self._in_chunks and not self._expected:
            return  # generate() with a prompt that the cache holds
        if self._expected or cached == 0:
            self._open(cached, cached + rows)
        elif self._in_chunks and cached + rows <= self._prompt:
            return  # the next chunk
        elif not 0 < self._prompt <= cached:
            raise RowMappingLost(
                f"{rows} rows behind {cached} cached ones belong to no known request; "
                "use generate() or reset()"
            )
        elif rows != 1 and self._running is None:
            raise RowMappingLost(
                f"eval of {rows} tokens behind a prompt may be a new turn; use generate()"
            )

    def _open(self, cached: int, rows: int) -> None:
        self._expected = False
        self._prompt, self._reported, self.outcomes = 0, False, ()
        self._images = [image for image in self._images if image.start < self.llama.n_tokens]
        self._in_chunks, total = self._announced > 0, self._announced or rows
        self._announced = 0
        self.context.begin(0, cached, total)
        self._prompt = total

    # -------------------------------------------------------- prompts in chunks

    def announce(self, rows: int) -> None:
        """The next rows on an empty cache start a prompt of `rows` rows, in several chunks."""
        self._announced = rows

    @contextlib.contextmanager
    def media(self) -> Iterator[None]:
        """Wraps the evaluation of a prompt in chunks: if it fails halfway, the cache is emptied."""
        try:
            yield
        finally:
            self._announced = 0
            if self._in_chunks and self._rows < self._prompt:
                self.recover()

    def decode_media(self, rows: int, positions: int, decode: Callable[[], int]) -> int:
        """Have `decode` add the rows of an image to the cache; returns its error code.

        Raises:
            UnsupportedFeature: more rows than a batch holds, and `n_batch` is not a multiple of
                `n_ubatch`.
        """
        size, part = self.llama.n_batch, llama_cpp.llama_n_ubatch(self.context.ctx)
        if rows > size and size % part:
            raise UnsupportedFeature(
                RUNTIME, f"an image of {rows} rows with n_batch {size}, n_ubatch {part}", "n_batch"
            )
        self.before_eval(rows)
        self._images.append(Image(self.llama.n_tokens, positions, rows))
        return self.context.decode_image(rows, decode)

    def _holds_images(self) -> bool:
        return bool(self._images) and self._images[0].start < self.llama.n_tokens

    @property
    def _rows(self) -> int:
        """Rows in the cache; `Llama.n_tokens` counts positions."""
        return self._row_at(self.llama.n_tokens)

    def _row_at(self, position: int) -> int:
        """The number of rows before a position. All rows of an image stand at its start."""
        row, more = position, 0
        for image in self._images:
            if image.start < position:
                more += image.rows - image.positions
                row = max(position, image.start + image.positions) + more
        return row

    # -------------------------------------------------------- recovery and refusals

    def recover(self) -> None:
        """Forget a failed request: empty cache, no open request."""
        self.context.recover()
        self._prompt = 0
        self._images = []
        self.llama.n_tokens = 0
        self.llama._requires_eval = True

    def loaded(self) -> None:
        """A saved state replaced the cache; its rows belong to no open request."""
        self.context.forget()
        self._prompt = 0

    def refuse_steered_cache(self) -> None:
        """Raise SteeredCache if the KV cache must not be saved and reused by later requests."""
        if self._holds_images():
            raise SteeredCache("the KV cache holds images, which a saved state takes for text")
        row = self.context.native.first_steered(0)
        if row is not None and row < self._rows:
            raise SteeredCache(
                f"the KV cache holds rows steered at a layer (from row {row} on); a saved state "
                "would carry them to requests that are not steered"
            )

    def refuse_state_cache(self, hint: str = "") -> None:
        """Raise UnsupportedFeature if saved states would carry steered rows to other requests."""
        if self._reach.layers:
            raise UnsupportedFeature(RUNTIME, _NO_STATE_CACHE, hint)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work on the context that generates nothing (embeddings)."""
        if self.context.failed:
            self.recover()
        self._prompt = 0
        with self.context.paused():
            yield

    def after_batch(self) -> None:
        """Keep the outcome, and report it once the prompt has ended and when the answer fires;
        called after each batch."""
        if self._reported and not self._reach.answers:
            return
        if (outcome := self.context.outcome(0)) is None:
            return
        news = not self._reported or outcome.rules != self.outcomes[0].rules
        self._reported, self.outcomes = True, (outcome,)
        if news and self._on_outcome is not None:
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
        readings = [p.token_reading for p in spec.probes if p.token_reading is not None]
        self.means = any(not isinstance(p, PromptEnd) for p in positions)
        self.whole = self.means or any(r.scope != "answer" for r in readings)
        self.answers = any(r.scope != "prompt" for r in readings)
        self._offset = min((p.offset for p in positions if isinstance(p, PromptEnd)), default=0)
        self.layers = any(not isinstance(x, HeadMatrix | Say) for x in spec.interventions)

    def cacheable(self, prompt: int, kept: int) -> int:
        """How many rows of a prompt may come from the cache: no probe reads them, or their
        values were kept."""
        if self.whole:
            return min(kept, prompt - 1)
        return max(0, prompt - 1 + self._offset)
