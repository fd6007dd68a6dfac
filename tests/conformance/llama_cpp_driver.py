"""The kit's driver for llama.cpp in process, through llama-cpp-python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._internals import LlamaBatch, LlamaContext
from llama_cpp.llama_chat_format import MTMDChatHandler
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.testing import vision
from steerbridge.testing.driver import Ability, Files, How, Reply
from steerbridge.testing.kit import Lacking
from steerbridge.testing.model import CONTEXT, EOS, VOCAB, TinyModel
from steerbridge_llama_cpp import SteeredContext, SteeredLlama

BATCH = 16
SEQUENCES = 8
ROWS = 512  # of a batch with several prompts
F32 = 0  # GGML_TYPE_F32


class Running:
    """A Llama; it keeps its cache between prompts by itself. Drafts need one of their own."""

    def __init__(self, opened: Callable[..., Any], package: SteeringPackage | None) -> None:
        self._opened, self._package = opened, package
        self.llama = opened()

    @cached_property
    def drafting(self) -> Any:
        return self._opened(draft_model=LlamaPromptLookupDecoding(2, 4), logits_all=True)

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        if len(prompts) > 1:
            if any(map(vision.pictures, prompts)):
                raise Lacking("libmtmd evaluates one prompt at a time")
            with contextlib.closing(self._sequences()) as context:
                return Sequences(context).ask([TinyModel.encode(p) for p in prompts], new)
        replies = []
        for prompt in prompts:
            for _ in range(how.samples):
                if vision.pictures(prompt):
                    replies.append(self._in_chat(prompt, new))
                else:
                    replies.append(self._one(TinyModel.encode(prompt), new, how))
        return replies

    def _in_chat(self, prompt: str, new: int) -> Reply:
        """An answer by llama-cpp-python's chat handler, which has libmtmd evaluate pictures."""
        answer = self.llama.create_chat_completion(
            [{"role": "user", "content": vision.content(prompt)}],
            max_tokens=new,
            temperature=0.0,
            repeat_penalty=1.0,
        )
        tokens = tuple(answer["choices"][0]["message"]["content"].encode())
        return Reply(tokens, outcome_of(self.llama))

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
                if token == EOS or len(tokens) == (how.cancel_after or new):
                    break
        return Reply(tuple(tokens), outcome_of(llama), first[0] if first else None)

    def _sequences(self) -> Any:
        """A context for several prompts at once, on the same model."""
        params = type(self.llama.context_params).from_buffer_copy(self.llama.context_params)
        params.n_seq_max, params.kv_unified = SEQUENCES, True
        params.n_batch = params.n_ubatch = ROWS
        if self._package is None:
            return LlamaContext(model=self.llama._model, params=params, verbose=False)
        return SteeredContext(self._package, model=self.llama._model, params=params)

    def break_hook(self) -> None:
        raise NotImplementedError


def outcome_of(llama: Any) -> Any:
    session = llama.__dict__.get("steering_session")
    return session.outcomes[0] if session and session.outcomes else None


class Sequences:
    """Greedy answers to several prompts in one batch, one sequence each."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._batch = LlamaBatch(n_tokens=ROWS, embd=0, n_seq_max=SEQUENCES, verbose=False)

    def ask(self, prompts: Sequence[list[int]], new: int) -> list[Reply]:
        steered = isinstance(self._context, SteeredContext)
        for seq, ids in enumerate(prompts):
            if steered:
                self._context.begin(seq, 0, len(ids))
        longest = max(map(len, prompts))
        rows = [  # interleaved, so that no sequence's rows lie together
            (seq, i, ids[i]) for i in range(longest) for seq, ids in enumerate(prompts)
            if i < len(ids)
        ]  # fmt: skip
        lengths = [len(ids) for ids in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        first: list[Any] = []
        ended: dict[int, Any] = {}
        for _ in range(new):
            logits = self._decode(rows, lengths)
            first = first or logits
            for seq, (answer, row) in enumerate(zip(answers, logits, strict=True)):
                answer.append(int(np.argmax(row)))
                if answer[-1] == EOS and steered and seq not in ended:
                    ended[seq] = self._context.outcome(seq)  # the batch goes on
            rows = [(seq, n, answers[seq][-1]) for seq, n in enumerate(lengths)]
            lengths = [n + 1 for n in lengths]
        outcomes = [
            (ended.get(s) or self._context.outcome(s)) if steered else None
            for s in range(len(prompts))
        ]
        return [
            Reply(tuple(tokens), outcome, row)
            for tokens, outcome, row in zip(answers, outcomes, first, strict=True)
        ]

    def _decode(self, rows: Sequence[tuple[int, int, int]], lengths: Sequence[int]) -> list[Any]:
        """Logits of each sequence's last row."""
        batch, last = self._batch.batch, {}
        batch.n_tokens = len(rows)
        for k, (seq, position, token) in enumerate(rows):
            batch.token[k], batch.pos[k] = token, position
            batch.n_seq_id[k], batch.seq_id[k][0] = 1, seq
            batch.logits[k] = position == lengths[seq] - 1
            if batch.logits[k]:
                last[seq] = k
        self._context.decode(self._batch)
        return [
            np.ctypeslib.as_array(self._context.get_logits_ith(last[s]), (VOCAB,)).copy()
            for s in range(len(lengths))
        ]


class LlamaCppDriver:
    """llama-cpp-python on the CPU, in F32 without flash attention, 16 rows at a time."""

    name = "llama.cpp"
    against = "real"
    abilities = frozenset(
        {
            Ability.BATCH,
            Ability.CONVERSATION,
            Ability.UNENDED,
            Ability.CANCEL,
            Ability.STREAM,
            Ability.SAMPLING,
            Ability.SAMPLES,
            Ability.NGRAM_DRAFTS,
            Ability.LOGITS,
            Ability.PICTURES,
            Ability.TEMPLATE,
            Ability.RESTART,
        }
    )
    batch = BATCH
    context = CONTEXT
    tolerance = 1e-4
    margin = 1e-3
    tells_the_end = True
    kept_open = 0

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
                if files.mmproj is not None:
                    more["chat_handler"] = MTMDChatHandler(str(files.mmproj), verbose=False)
                kind = llama_cpp.Llama if package is None else SteeredLlama
                made = kind(str(files.gguf), **guard, **options, **more)
                return stack.enter_context(contextlib.closing(made))

            yield Running(opened, package)
