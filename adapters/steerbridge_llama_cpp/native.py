"""libsteerhook through ctypes: packages, sessions, and their refusals as typed errors.

The contract of every call is in `native/steerhook.h`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import weakref
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge.errors import (
    HookLost,
    RowMappingLost,
    SteeredCache,
    SteeringFailed,
    UnsupportedFeature,
)
from steerbridge.package import SteeringPackage
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome

RUNTIME: Final = "llama.cpp"

_NAME = "libsteerhook.dylib" if sys.platform == "darwin" else "libsteerhook.so"
_ERRORS: dict[str, type[SteeringFailed]] = {
    "HOOK_LOST": HookLost,
    "STEERED": SteeredCache,
    **dict.fromkeys(
        ("SEQUENCE", "NO_REQUEST", "CACHED", "PROMPT", "NO_OUTPUT", "SHARED_ROW", "ROWS"),
        RowMappingLost,
    ),
}


class _Model(ctypes.Structure):
    _fields_ = (
        ("architecture", c_char_p),
        ("n_embd", c_int32),
        ("n_layer", c_int32),
        ("n_ubatch", c_int32),
        ("n_seq_max", c_int32),
        ("n_deepstack", c_int32),
    )


class _Ggml(ctypes.Structure):
    _fields_ = (
        ("get_name", c_void_p),
        ("nbytes", c_void_p),
        ("tensor_get", c_void_p),
        ("tensor_set", c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("output", POINTER(c_int8)),
        ("image", c_bool),
        ("tokens", POINTER(c_int32)),
    )


class _Verdict(ctypes.Structure):
    _fields_ = (
        ("probe", c_char_p),
        ("score", c_double),
        ("threshold", c_double),
        ("fired", c_bool),
        ("unjudged", c_char_p),
        ("in_answer", c_bool),
        ("row", c_int32),
    )


class _RuleState(ctypes.Structure):
    _fields_ = (("rule", c_char_p), ("decided", c_bool), ("fired", c_bool), ("strength", c_double))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a session must know of its context, by llama.cpp's names."""

    architecture: str
    n_embd: int
    n_layer: int
    n_ubatch: int
    n_seq_max: int
    n_deepstack: int = 0


def library_path() -> Path:
    """Where libsteerhook is: beside this file.

    Raises:
        UnsupportedFeature: this installation was built without a C compiler.
    """
    path = Path(__file__).with_name(_NAME)
    if not path.is_file():
        raise UnsupportedFeature(
            RUNTIME,
            f"{path.name} was not built",
            "reinstall steerbridge on a machine with a C compiler",
        )
    return path


def _load() -> Any:
    library = ctypes.CDLL(str(library_path()))
    pointer = c_void_p
    for name, result, arguments in (
        ("status_name", c_char_p, [c_int32]),
        ("package_load", pointer, [c_char_p, c_char_p, c_size_t]),
        ("package_free", None, [pointer]),
        ("session_new", pointer, [pointer, pointer, pointer, c_char_p, c_size_t]),
        ("session_free", None, [pointer]),
        ("session_clear", c_int32, [pointer]),
        ("session_status", c_int32, [pointer]),
        ("session_error", c_char_p, [pointer]),
        ("pause", c_int32, [pointer, c_bool]),
        ("request_begin", c_int32, [pointer, c_int32, c_int32, c_int32]),
        ("request_copy", c_int32, [pointer, c_int32, c_int32]),
        ("request_cut", c_int32, [pointer, c_int32, c_int32, c_int32]),
        ("request_end", c_int32, [pointer, c_int32]),
        ("first_steered", c_int32, [pointer, c_int32]),
        ("keep_rows", c_int32, [pointer, c_bool]),
        ("kept_rows", c_int32, [pointer, c_int32]),
        ("batch_begin", c_int32, [pointer, POINTER(_Batch)]),
        ("batch_end", c_int32, [pointer]),
        ("batch_cancel", c_int32, [pointer]),
        ("verdicts", c_int32, [pointer, c_int32, POINTER(_Verdict), c_int32]),
        ("rules", c_int32, [pointer, c_int32, POINTER(_RuleState), c_int32]),
        ("row_logits", c_int32, [pointer, c_int32, c_char_p, POINTER(c_float), c_int32]),
        ("readings", c_int64, [pointer, c_int32, c_char_p, POINTER(c_double), c_int64]),
    ):
        function = getattr(library, f"steerhook_{name}")
        function.restype, function.argtypes = result, arguments
    return library


_library: Any = None


def library() -> Any:
    """The loaded library, its functions declared."""
    global _library
    if _library is None:
        _library = _load()
    return _library


def _load_package(package: SteeringPackage) -> int:
    """Pass a package to the library, as a GGUF file.

    The package in memory was checked, so it is written to a new file instead of read again from
    its source. The library maps the file, which may be deleted afterwards.
    """
    error = ctypes.create_string_buffer(512)
    with tempfile.TemporaryDirectory(prefix="steerbridge-") as folder:
        path = package.save(Path(folder) / "package.gguf")
        handle = library().steerhook_package_load(os.fsencode(path), error, len(error))
    if not handle:
        raise SteeringFailed(f"libsteerhook refused the package: {error.value.decode()}")
    return int(handle)


class NativeSession:
    """A `steerhook_session` and the package it runs, freed together.

    Raises:
        UnsupportedFeature: the package needs a site that llama.cpp does not expose.
    """

    def __init__(self, package: SteeringPackage, shape: Shape, ggml: Any) -> None:
        self._library = library()
        self._probes = {p.id: p for p in package.spec.probes}
        self._rules = len(package.spec.rules)
        self._width = package.spec.base_model.hidden_size
        self._batch = _Batch()
        self.is_paused = False
        handle = _load_package(package)
        error = ctypes.create_string_buffer(512)
        functions = _Ggml(
            *(
                ctypes.cast(getattr(ggml, name), c_void_p)
                for name in (
                    "ggml_get_name",
                    "ggml_nbytes",
                    "ggml_backend_tensor_get",
                    "ggml_backend_tensor_set",
                )
            )
        )
        model = _Model(
            shape.architecture.encode(),
            shape.n_embd,
            shape.n_layer,
            shape.n_ubatch,
            shape.n_seq_max,
            shape.n_deepstack,
        )
        self._session = self._library.steerhook_session_new(
            handle, ctypes.byref(model), ctypes.byref(functions), error, len(error)
        )
        self._library.steerhook_package_free(handle)  # the session keeps its own reference
        if not self._session:
            raise UnsupportedFeature(RUNTIME, error.value.decode())
        weakref.finalize(self, self._library.steerhook_session_free, self._session)

    @property
    def callback(self) -> tuple[int, int]:
        """Addresses of `cb_eval` and its user data for a context."""
        function = ctypes.cast(self._library.steerhook_eval, c_void_p).value
        assert function is not None
        return function, self._session

    @property
    def failed(self) -> bool:
        """True after an error in a batch: `clear` is required."""
        return bool(self._library.steerhook_session_status(self._session))

    # -------------------------------------------------------- requests

    def begin(self, seq: int, n_cached: int, n_prompt: int) -> None:
        self._check(self._library.steerhook_request_begin(self._session, seq, n_cached, n_prompt))

    def copy(self, source: int, target: int) -> None:
        self._check(self._library.steerhook_request_copy(self._session, source, target))

    def cut(self, seq: int, start: int, stop: int) -> None:
        self._check(self._library.steerhook_request_cut(self._session, seq, start, stop))

    def end(self, seq: int) -> None:
        self._check(self._library.steerhook_request_end(self._session, seq))

    def keep_rows(self) -> None:
        """Keep the values that means read, so that later prompts may begin with cached rows."""
        self._check(self._library.steerhook_keep_rows(self._session, False))

    def kept_rows(self, seq: int) -> int:
        """Rows at the start of a sequence that a later prompt may begin with."""
        return int(self._library.steerhook_kept_rows(self._session, seq))

    def first_steered(self, seq: int) -> int | None:
        """First row in the cache of a sequence that was steered at a layer; None: none was."""
        row: int = self._library.steerhook_first_steered(self._session, seq)
        return None if row < 0 else row

    def pause(self, paused: bool) -> None:
        self._check(self._library.steerhook_pause(self._session, paused))
        self.is_paused = paused

    def clear(self) -> None:
        self._check(self._library.steerhook_session_clear(self._session))

    # -------------------------------------------------------- batches

    def batch_begin(self, batch: Any, *, every_output: Any = None) -> None:
        """Announce a `llama_batch`; `every_output` replaces its output flags."""
        ours = self._batch
        ours.n_tokens = batch.n_tokens
        ours.n_seq_id, ours.seq_id = batch.n_seq_id, batch.seq_id
        ours.output = batch.logits if every_output is None else every_output
        ours.image, ours.tokens = False, batch.token
        self._check(self._library.steerhook_batch_begin(self._session, ctypes.byref(ours)))

    def rows_begin(self, rows: int, image: bool) -> None:
        """Announce rows of sequence 0, none of which is an output."""
        ours = self._batch
        none = (c_int8 * rows)()
        ours.n_tokens, ours.n_seq_id, ours.seq_id = rows, None, None
        ours.output, ours.image, ours.tokens = none, image, None
        self._check(self._library.steerhook_batch_begin(self._session, ctypes.byref(ours)))

    def batch_end(self) -> None:
        self._check(self._library.steerhook_batch_end(self._session))

    def batch_cancel(self) -> None:
        self._check(self._library.steerhook_batch_cancel(self._session))

    # -------------------------------------------------------- results

    def outcome(self, seq: int) -> Outcome | None:
        """Outcome of the latest request of a sequence; None until every rule is decided."""
        rules = (_RuleState * max(self._rules, 1))()
        self._count(self._library.steerhook_rules(self._session, seq, rules, self._rules))
        verdicts = (_Verdict * max(len(self._probes), 1))()
        known = self._count(
            self._library.steerhook_verdicts(self._session, seq, verdicts, len(self._probes))
        )
        decided = all(rules[i].decided for i in range(self._rules))
        if known < len(self._probes) or not decided:
            return None
        fired = (rules[i].rule.decode() for i in range(self._rules) if rules[i].fired)
        return Outcome(tuple(self._verdict(verdicts[i]) for i in range(known)), tuple(fired))

    def _verdict(self, verdict: Any) -> Verdict:
        name = verdict.probe.decode()
        comparator = self._probes[name].comparator
        return Verdict(
            name,
            verdict.score,
            verdict.threshold,
            comparator,
            verdict.fired,
            verdict.unjudged.decode(),
            ("answer" if verdict.in_answer else "prompt") if verdict.fired else "",
            None if verdict.row < 0 else verdict.row,
        )

    def readings(self, seq: int, probe: str) -> NDArray[np.float64]:
        """What a probe of the latest request read, [K, D] before standardisation.

        Raises:
            HookLost: the prompt has not ended.
        """
        count = len(self._probes[probe].readings) * self._width
        out = np.empty(count, np.float64)
        pointer = out.ctypes.data_as(POINTER(c_double))
        got = self._count(
            self._library.steerhook_readings(self._session, seq, probe.encode(), pointer, count)
        )
        if got != count:
            raise HookLost(f"probe {probe}: the prompt ended without its readings")
        return out.reshape(-1, self._width)

    def row_logits(self, seq: int, probe: str, rows: int) -> NDArray[np.float32]:
        """Logits [T] of the rows of a sequence; infinite where a row was not in scope.

        Raises:
            HookLost: not so many rows are known.
        """
        out = np.empty(rows, np.float32)
        pointer = out.ctypes.data_as(POINTER(c_float))
        got = self._count(
            self._library.steerhook_row_logits(self._session, seq, probe.encode(), pointer, rows)
        )
        if got != rows:
            raise HookLost(f"probe {probe}: expected logits of {rows} rows, found {got}")
        return out

    def _count(self, result: int) -> int:
        if result < 0:
            self._check(-result)
        return result

    def _check(self, status: int) -> None:
        if status:
            name = self._library.steerhook_status_name(status).decode()
            text = self._library.steerhook_session_error(self._session).decode()
            raise _ERRORS.get(name, SteeringFailed)(f"{text or 'refused'} ({name})")
