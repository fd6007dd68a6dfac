"""The llama.cpp part of `make bench-overhead`: SmolLM2 as shipped (Q4_1), greedy.

Six Llamas take turns: plain; plain again; the guard on prompts that do not fire; the guard made
to fire, its head at low rank; and a callback in plain Python that does the same work, on prompts
that do not fire and on prompts that do.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _internals as internals

import ratios
from common import generation_times, low_rank, say, with_threshold
from steerbridge import SteeringPackage, smollm2
from steerbridge_llama_cpp import LlamaCppModel, steer

NEW = 48
RANK = 32
SIDES = ("plain", "control", "quiet", "fired", "python_quiet", "python_fired")


def measure(package: SteeringPackage, prompts: Sequence[Any]) -> dict[str, Any]:
    """Ratios of plain over steered time; see the module's docstring."""
    fired = with_threshold(low_rank(package, RANK), -1.0)
    llamas = {name: llama_cpp.Llama(str(smollm2()), n_ctx=2048, verbose=False) for name in SIDES}
    render = LlamaCppModel(llamas["plain"]).render
    session = steer(llamas["quiet"], package)
    steer(llamas["fired"], fired)
    peers = [
        PythonCallback(llamas["python_quiet"], package, fires=False),
        PythonCallback(llamas["python_fired"], fired, fires=True),
    ]
    rounds = []
    for i, prompt in enumerate(prompts):
        tokens = render(prompt)
        run(llamas["quiet"], tokens, 1)
        if session.outcomes[0].fired:
            say(f"fired on a harmless prompt: {prompt.text}")
            continue
        runs = {name: partial(run, llama, tokens) for name, llama in llamas.items()}
        rounds.append(generation_times(i, runs, NEW))
    assert all(p.calls for p in peers)
    return {**figures(rounds), "rank": RANK, "rounds": len(rounds)}


def figures(rounds: Sequence[tuple[ratios.Times, ratios.Times]]) -> dict[str, Any]:
    first, later = zip(*rounds, strict=True)
    return ratios.report(
        {
            "ttft_ratio": ratios.of_rounds(first, "quiet"),
            "decode_ratio": ratios.of_rounds(later, "quiet"),
            "fired_ttft_ratio": ratios.of_rounds(first, "fired"),
            "fired_decode_ratio": ratios.of_rounds(later, "fired"),
            "python_callback_quiet_ratio": ratios.of_rounds(later, "python_quiet"),
            "python_callback_ratio": ratios.of_rounds(later, "python_fired"),
        }
    )


def run(llama: Any, tokens: list[int], new: int) -> float:
    """Seconds of one greedy generation of exactly `new` tokens, the prompt evaluated afresh."""
    llama.reset()
    start = time.perf_counter()
    for count, _ in enumerate(llama.generate(tokens, temp=0.0), 1):
        if count == new:
            break
    return time.perf_counter() - start


class PythonCallback:
    """The same work in a ctypes callback: read the probe's sites at the prompt end, write the head.

    This is what one would write by hand. It looks at names only, so it reads whole nodes.
    """

    def __init__(self, llama: Any, package: SteeringPackage, *, fires: bool) -> None:
        self._package, self._fires, self.calls = package, fires, 0
        self._llama = llama
        self._ggml = llama_cpp.llama_cpp._lib
        self._ggml.ggml_get_name.restype = ctypes.c_char_p
        self._ggml.ggml_nbytes.restype = ctypes.c_size_t
        for name in ("ggml_get_name", "ggml_nbytes"):
            getattr(self._ggml, name).argtypes = [ctypes.c_void_p]
        for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
            arguments = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
            getattr(self._ggml, name).argtypes = arguments
        spec = package.spec
        self._reads = {
            f"l_out-{spec.depth(r.site) - 1}".encode() for p in spec.probes for r in p.readings
        }
        if fires:
            head: Any = spec.interventions[0]
            u, v = (package.tensors[n].float32() for n in (head.weight.u, head.weight.v))
            self._head = u, v, np.float32(head.eps)
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._call)
        params = type(llama.context_params).from_buffer_copy(llama.context_params)
        params.cb_eval = self._callback
        llama._ctx.close()
        llama._ctx = internals.LlamaContext(model=llama._model, params=params, verbose=False)

    def _call(self, node: int, ask: bool, _data: Any) -> bool:
        name = self._ggml.ggml_get_name(node)
        prompt = self._llama.n_tokens == 0
        wanted = (prompt and name in self._reads) or (self._fires and name == b"result_norm")
        if ask or not wanted:
            return wanted if ask else True
        self.calls += 1
        size = self._ggml.ggml_nbytes(node)
        h = np.empty(size // 4, np.float32)
        self._ggml.ggml_backend_tensor_get(node, h.ctypes.data, 0, size)
        if name == b"result_norm":
            rows = h.reshape(-1, self._package.spec.base_model.hidden_size)
            new = self._steered(rows)
            self._ggml.ggml_backend_tensor_set(node, new.ctypes.data, 0, size)
        return True

    def _steered(self, rows: Any) -> Any:
        u, v, eps = self._head
        return np.ascontiguousarray(rows + eps * (rows @ v.T) @ u.T)
