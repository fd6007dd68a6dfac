"""Scripts that use llama.cpp's C API through llama-cpp-python, under `steerbridge run`."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from test_run import package, steered

NEVER, ALWAYS = 1e9, -1e9  # thresholds
TEXT = "The three colours of the flag are red, white and"

START = """
import ctypes, json, sys
import llama_cpp as c
import numpy as np
kind, path, text = sys.argv[1:4]
quiet = c.llama_log_callback(lambda *_: None)
c.llama_log_set(quiet, ctypes.c_void_p())
model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
vocab = c.llama_model_get_vocab(model)
width = c.llama_vocab_n_tokens(vocab)
params = c.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_threads = 512, 512, 2
params.n_seq_max, params.kv_unified = 4, True
params.embeddings = kind == "embeddings"
context = c.llama_init_from_model(model, params)
memory = c.llama_get_memory(context)
sampler = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
c.llama_sampler_chain_add(sampler, c.llama_sampler_init_greedy())
ids = (c.llama_token * 256)()
text = text.encode()
prompt = list(ids[:c.llama_tokenize(vocab, text, len(text), ids, 256, True, True)])

def decode(tokens, start, outputs=None, seq=0):
    batch = c.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, start + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        batch.logits[i] = i == len(tokens) - 1 if outputs is None else i in outputs
    assert c.llama_decode(context, batch) == 0
    c.llama_batch_free(batch)

def greedy(index=-1):
    return c.llama_sampler_sample(sampler, context, index)

def argmax(index=-1):
    return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, index), (width,)).argmax())

def whole():
    return int(np.ctypeslib.as_array(c.llama_get_logits(context), (width,)).argmax())

def loop(choose, start, count=6):
    tokens = []
    while len(tokens) < count:
        tokens.append(int(choose()))
        decode(tokens[-1:], start + len(tokens) - 1)
    return tokens

told = []
"""


class Runs:
    """What a script prints for each kind of use, and the events told; each is run once.

    Args:
        script: what follows `START`; it fills the list `told`.
        options: of `test_run.package`.
    """

    def __init__(self, folder: Path, model: Path, script: str, **options: Any) -> None:
        self.folder, self._model, self._options = folder, model, options
        self._path = folder / "app.py"
        self._path.write_text(START + textwrap.dedent(script) + "print(json.dumps(told))\n")
        self._known: dict[Any, tuple[Any, list[Any]]] = {}

    def __call__(self, kind: str, limit: float = NEVER, text: str = TEXT) -> tuple[Any, list[Any]]:
        key = kind, limit, text
        if key not in self._known:
            guard = package(self._model, limit, self.folder, **self._options)
            command = [sys.executable, str(self._path), kind, str(self._model), text]
            log = self.folder / f"{len(self._known)}.jsonl"
            done, events = steered(guard, command, log=log, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            answer = json.loads(done.stdout.splitlines()[-1])
            self._known[key] = answer, [e for e in events if e["event"] != "active"]
        return self._known[key]


def scores(events: list[Any]) -> list[Any]:
    """The score of the first probe of each verdict."""
    return [event["probes"][0]["score"] for event in events if event["event"] == "verdict"]
