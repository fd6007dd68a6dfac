"""The kit's driver for llama.cpp in process, through llama-cpp-python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.testing.driver import Ability, Files, How, Reply
from steerbridge.testing.model import CONTEXT, TinyModel
from steerbridge_llama_cpp import SteeredLlama

BATCH = 16
F32 = 0  # GGML_TYPE_F32


class Running:
    """A Llama; it keeps its cache between prompts by itself. Drafts need one of their own."""

    def __init__(self, opened: Callable[..., Any]) -> None:
        self._opened = opened
        self.llama = opened()

    @cached_property
    def drafting(self) -> Any:
        return self._opened(draft_model=LlamaPromptLookupDecoding(2, 4))

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        replies = []
        for prompt in prompts:
            for _ in range(how.samples):
                replies.append(self._one(TinyModel.encode(prompt), new, how))
        return replies

    def _one(self, ids: list[int], new: int, how: How) -> Reply:
        llama, first = self.drafting if how.drafts else self.llama, list[Any]()
        if len(ids) + new > CONTEXT:  # llama-cpp-python's own ValueError, before the first token
            raise UnsupportedFeature("llama.cpp", f"{len(ids)} tokens in a context of {CONTEXT}")

        def keep(_: Any, scores: Any) -> Any:
            if not first:
                first.append(np.array(scores, np.float32))
            return scores

        tokens: list[int] = []
        stream = llama.generate(
            ids,
            temp=how.temperature,
            repeat_penalty=1.0,
            logits_processor=llama_cpp.LogitsProcessorList([keep]),
        )
        with contextlib.closing(stream):
            for token in stream:
                tokens.append(int(token))
                if len(tokens) == (how.cancel_after or new):
                    break
        session = llama.__dict__.get("steering_session")
        outcome = session.outcomes[0] if session and session.outcomes else None
        return Reply(tuple(tokens), outcome, first[0] if first else None)

    def break_hook(self) -> None:
        """The hook takes no part any more, as if another callback had been set."""
        self.llama._ctx.native.pause(True)


class LlamaCppDriver:
    """llama-cpp-python on the CPU, in F32 without flash attention, 16 rows at a time."""

    name = "llama.cpp"
    against = "real"
    abilities = frozenset(
        {
            Ability.CONVERSATION,
            Ability.CANCEL,
            Ability.STREAM,
            Ability.SAMPLING,
            Ability.SAMPLES,
            Ability.NGRAM_DRAFTS,
            Ability.LOGITS,
            Ability.TEMPLATE,
            Ability.RESTART,
        }
    )
    batch = BATCH
    context = CONTEXT
    tolerance = 1e-4
    margin = 1e-3

    @contextlib.contextmanager
    def open(self, files: Files, package: SteeringPackage | None) -> Iterator[Running]:
        options: dict[str, Any] = {
            "n_ctx": CONTEXT,
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "n_threads": 1,
            "type_k": F32,
            "type_v": F32,
            "flash_attn": False,
            "verbose": False,
        }
        with contextlib.ExitStack() as stack:

            def opened(**more: Any) -> Any:
                guard = {} if package is None else {"package": package}
                kind = llama_cpp.Llama if package is None else SteeredLlama
                made = kind(str(files.gguf), **guard, **options, **more)
                return stack.enter_context(contextlib.closing(made))

            yield Running(opened)
