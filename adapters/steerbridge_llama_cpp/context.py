"""A steered llama.cpp context, for decoding loops of your own.

    context = SteeredContext(package, model=model, params=params)
    context.begin(seq, n_cached, n_prompt)     for each request
    context.decode(batch)                      any rows of any sequences
    context.outcome(seq)                       once its prompt has ended

A steered `Llama` has such a context (see `session.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import llama_cpp
from llama_cpp import _internals as internals

from steerbridge.errors import RowMappingLost, SteeringFailed, UnsupportedFeature
from steerbridge.fingerprint import check_said, file_sha256
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge_llama_cpp.facts import facts_for, quantisation
from steerbridge_llama_cpp.native import RUNTIME, NativeSession, Shape

REQUIRES: Final = ((0, 3, 36), (0, 4))
"""Range of llama-cpp-python versions [low, high): steering depends on its internals."""


class SteeredContext(internals.LlamaContext):
    """A `LlamaContext` that reports its batches and KV cache edits to libsteerhook.

    Args:
        package: checked against the model; thresholds calibrated for its quantisation under
            the runtime name `llama.cpp` are used if the package holds any.
        model: a `LlamaModel` (`Llama._model`).
        params: `llama_context_params`; their evaluation callback is replaced. With several
            sequences the KV cache must be unified.
        ignore: names of base-model fields that may differ (see `fingerprint.CHECKED`).
        after_batch: called after every batch that was decoded.
        keep_rows: keep the values of prompt rows that means read (4 bytes per row, reading and
            hidden unit), so that a later prompt may begin with these rows.

    Raises:
        ModelMismatch: the package was made for another model.
        UnsupportedFeature: a site that llama.cpp does not expose, a KV cache that is not
            unified, several sequences of a recurrent or hybrid model, an encoder, another version
            of llama-cpp-python.
    """

    def __init__(
        self,
        package: SteeringPackage,
        *,
        model: Any,
        params: Any,
        ignore: Collection[str] = (),
        after_batch: Callable[[], None] = lambda: None,
        keep_rows: bool = False,
        verbose: bool = False,
    ) -> None:
        self._exit_stack = contextlib.ExitStack()  # used by __del__ if this raises
        check_version()
        if params.n_seq_max > 1 and not params.kv_unified:
            raise UnsupportedFeature(
                RUNTIME, f"{params.n_seq_max} sequences without a unified KV cache", "kv_unified"
            )
        if params.n_seq_max > 1 and _has_states(model.model):
            raise UnsupportedFeature(
                RUNTIME,
                f"{params.n_seq_max} sequences of a recurrent or hybrid model: rows are reordered",
            )
        if llama_cpp.llama_model_has_encoder(model.model):
            raise UnsupportedFeature(RUNTIME, "models with an encoder")
        if params.cb_eval:
            raise UnsupportedFeature(RUNTIME, "another evaluation callback on the context")
        self.unchecked = package.check(facts_for(model, package.spec.base_model), ignore)
        check_said(package.spec, lambda ids: model.detokenize(ids).decode(errors="replace"), ignore)
        self.package = package.calibrated(
            RUNTIME, quantisation(model), lambda: file_sha256(Path(model.path_model))
        )
        shape = Shape(
            model.metadata().get("general.architecture", ""),
            model.n_embd(),
            llama_cpp.llama_model_n_layer(model.model),
            _n_ubatch(params),
            params.n_seq_max,
            _n_deepstack(model.metadata()),
        )
        # Kept alive here: the callback uses it as long as the context lives.
        self.native = NativeSession(self.package, shape, llama_cpp.llama_cpp._lib)
        if keep_rows:
            self.native.keep_rows()
        params = type(params).from_buffer_copy(params)
        function, data = self.native.callback
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(function)
        params.cb_eval_user_data = data
        self._decoding = False
        self._after_batch = after_batch
        self.row_at: Callable[[int], int] = lambda position: position
        """The number of rows before a position, where images take fewer of these than rows."""
        super().__init__(model=model, params=params, verbose=verbose)
        self._check_ubatch(shape)

    def _check_ubatch(self, shape: Shape) -> None:
        n_ubatch = llama_cpp.llama_n_ubatch(self.ctx)
        if n_ubatch != shape.n_ubatch:
            self.close()  # type: ignore[no-untyped-call]
            raise UnsupportedFeature(RUNTIME, f"n_ubatch {shape.n_ubatch} became {n_ubatch}")

    # -------------------------------------------------------- requests

    def begin(self, seq: int, n_cached: int, n_prompt: int) -> None:
        """A prompt of `n_prompt` rows starts on a sequence; `n_cached` are in the KV cache.

        Raises:
            RowMappingLost: a row that a probe reads is cached, or there is nothing to evaluate.
            SteeredCache: a cached row was steered at a layer for an earlier request.
        """
        self.native.begin(seq, n_cached, n_prompt)

    def copy(self, source: int, target: int) -> None:
        """Copy the state of a request to another sequence; the caller copies the KV cache."""
        self.native.copy(source, target)

    def end(self, seq: int) -> None:
        """No more rows of this sequence's request will come."""
        self.native.end(seq)

    def outcome(self, seq: int) -> Outcome | None:
        """Outcome of the latest request of a sequence; None before its prompt has ended."""
        return self.native.outcome(seq)

    @property
    def failed(self) -> bool:
        """True if a batch failed or was interrupted: `recover` is required."""
        return self._decoding or self.native.failed

    def recover(self) -> None:
        """Forget every request and any failure; the KV cache is emptied."""
        self.forget()
        self.kv_cache_clear()

    def forget(self) -> None:
        """Forget every request and any failure; rows in the cache belong to no request."""
        self.native.clear()
        self._decoding = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work that generates nothing (embeddings): not steered. Ends every request."""
        self.native.pause(True)
        try:
            yield
        finally:
            self.native.pause(False)
            self.native.cut(-1, 0, -1)

    # -------------------------------------------------------- batches

    def decode(self, batch: Any) -> None:
        """`llama_decode` of a `LlamaBatch`, steered.

        Raises:
            SteeringFailed: a row belongs to no request, or a node was not evaluated. No logits
                of this batch may be used; `recover` before the next.
            RuntimeError: llama_decode failed.
        """
        if self.native.is_paused:
            super().decode(batch)
            return
        inner = batch.batch
        every = None
        if self.params.embeddings:  # llama.cpp then makes every row an output
            every = (ctypes.c_int8 * inner.n_tokens)(*[1] * inner.n_tokens)
        self.native.batch_begin(inner, every_output=every)
        if code := self._watched(lambda: int(llama_cpp.llama_decode(self.ctx, inner))):
            raise RuntimeError(f"llama_decode returned {code}")

    def decode_image(self, rows: int, decode: Callable[[], int]) -> int:
        """Have other code decode the rows of an image on sequence 0, none of them an output.

        Args:
            decode: returns 0 or an error code, which is returned.

        Raises:
            SteeringFailed: as `decode`.
        """
        self.native.rows_begin(rows, True)
        return self._watched(decode)

    def _watched(self, decode: Callable[[], int]) -> int:
        """Run `decode` for the batch that was begun."""
        self._decoding = True  # until all of it has succeeded
        if code := decode():
            self.native.batch_cancel()
            self._decoding = False
            return code
        self.native.batch_end()
        self._decoding = False
        self._after_batch()
        return 0

    def encode(self, batch: Any) -> None:  # noqa: ARG002
        """Refused: see the class."""
        raise UnsupportedFeature(RUNTIME, "llama_encode")

    # -------------------------------------------------------- the KV cache

    def kv_cache_clear(self) -> None:
        super().kv_cache_clear()  # type: ignore[no-untyped-call]
        self._cut(-1, 0, -1)

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        removed: bool = super().kv_cache_seq_rm(seq_id, p0, p1)
        if removed:
            self._cut(max(seq_id, 0), max(p0, 0), p1)
        return removed

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        """Copies cells, not the request: call `copy` or `begin` for the target's request.

        Which rows were steered is copied with the cells.
        """
        super().kv_cache_seq_cp(seq_id_src, seq_id_dst, p0, p1)
        with contextlib.suppress(RowMappingLost):  # no open request: first_steered was copied
            self.native.copy(seq_id_src, seq_id_dst)
        self.native.end(seq_id_dst)

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        super().kv_cache_seq_keep(seq_id)
        for other in range(self.params.n_seq_max):
            if other != seq_id:
                self._cut(other, 0, -1)

    def _cut(self, seq: int, start: int, stop: int) -> None:
        """`start` and `stop` are positions."""
        if not self.failed and not self.native.is_paused:
            stop = stop if stop < 0 else self.row_at(stop)
            self.native.cut(seq, self.row_at(start), stop)


def _has_states(model: Any) -> bool:
    """Whether a model has recurrent states, whose rows llama.cpp takes sequence by sequence."""
    return bool(llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model))


def _n_ubatch(params: Any) -> int:
    """Rows of a micro-batch as llama.cpp will set them; checked once the context exists."""
    n_batch = min(params.n_batch, params.n_ctx or params.n_batch)
    return int(min(params.n_ubatch or n_batch, n_batch))


def _n_deepstack(metadata: Mapping[str, str]) -> int:
    """To how many blocks' outputs features of an image are added; -1: they are added elsewhere."""
    architecture = metadata.get("general.architecture", "")
    if f"{architecture}.deepstack_mapping" in metadata:
        return -1
    return int(metadata.get(f"{architecture}.n_deepstack_layers", 0))


def check_version() -> None:
    """Raise UnsupportedFeature for an unsupported version of llama-cpp-python."""
    installed = version("llama-cpp-python")
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdecimal())
    low, high = REQUIRES
    if not low <= numbers < high:
        want = f">={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
        raise UnsupportedFeature(RUNTIME, f"llama-cpp-python {installed}", f"install {want}")


def set_lora(context: Any, adapter: Any, scale: float) -> None:
    """Put a LoRA adapter on a context.

    Raises:
        SteeringFailed: llama.cpp refuses it.
    """
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(scale)
    if llama_cpp.llama_set_adapters_lora(context.ctx, adapters, 1, scales):
        raise SteeringFailed("llama.cpp refused the LoRA adapter for the new context")
