"""A program that uses llama.cpp at random, under `steerbridge run`.

It writes what it meant: for each prompt whose logits it used, the tokens in the cache up to its
end, and the earlier prompts of the conversation whose verdicts must stay. `fuzz_sessions.py`
compares that with what the guard told. One library is the real libllama with the kit's tiny model;
the other is the stand-in `stub_llama.c`.

    python sessions.py real MODEL | stub LIBRARY  SEED STEPS OUTPUT
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from dataclasses import dataclass, field, replace
from typing import Any

SEQUENCES, BATCH, MICRO_BATCH, ROOM = 3, 32, 8, 200
START, END = 35, 256  # a prompt begins with '#', which is never sampled
LETTERS = range(97, 105)

Ints = ctypes.POINTER(ctypes.c_int32)


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", Ints),
        ("embd", ctypes.c_void_p),
        ("pos", Ints),
        ("n_seq_id", Ints),
        ("seq_id", ctypes.POINTER(Ints)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class Candidate(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float)]


class Candidates(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.POINTER(Candidate)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    ]


_last: list[bytes] = []  # of llama.cpp's log


def _log(level: int, text: bytes, _data: Any) -> None:
    _last[:] = [*_last[-9:], text]


class Library:
    """The C functions, of libllama or of its stand-in."""

    def __init__(self, kind: str, path: str) -> None:
        if kind == "real":
            import llama_cpp

            self._c: Any = llama_cpp
            quiet = llama_cpp.llama_log_callback(_log)
            llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
            self._quiet = quiet
            library = llama_cpp.llama_cpp._lib
            self._model = llama_cpp.llama_model_load_from_file(
                path.encode(), llama_cpp.llama_model_default_params()
            )
            chain = llama_cpp.llama_sampler_chain_default_params()
            self.sampler = llama_cpp.llama_sampler_chain_init(chain)
            llama_cpp.llama_sampler_chain_add(self.sampler, llama_cpp.llama_sampler_init_greedy())
        else:
            library, self._c = ctypes.CDLL(path), None
            self.sampler = None
        pointer, i32, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t

        def bind(name: str, result: Any, *arguments: Any) -> Any:
            # A prototype of its own: llama_cpp has set others.
            return ctypes.CFUNCTYPE(result, *arguments)((name, library))

        self._stub_context = None if self._c else bind("stub_context", pointer, i32, i32, i32, i32)
        self.free = bind("llama_free", None, pointer)
        self.memory = bind("llama_get_memory", pointer, pointer)
        self.decode = bind("llama_decode", i32, pointer, Batch)
        self.logits = bind("llama_get_logits_ith", pointer, pointer, i32)
        self.all_logits = bind("llama_get_logits", pointer, pointer)
        self.apply = bind("llama_sampler_apply", None, pointer, ctypes.POINTER(Candidates))
        self.sample = bind("llama_sampler_sample", i32, pointer, pointer, i32)
        self.clear = bind("llama_memory_clear", None, pointer, ctypes.c_bool)
        self.remove = bind("llama_memory_seq_rm", ctypes.c_bool, pointer, i32, i32, i32)
        self.copy = bind("llama_memory_seq_cp", None, pointer, i32, i32, i32, i32)
        self.add = bind("llama_memory_seq_add", None, pointer, i32, i32, i32, i32)
        self.state_size = bind("llama_state_seq_get_size", size, pointer, i32)
        self.get_state = bind("llama_state_seq_get_data", size, pointer, pointer, size, i32)
        self.set_state = bind("llama_state_seq_set_data", size, pointer, pointer, size, i32)

    def context(self, unified: bool) -> int:
        if self._stub_context is not None:
            made: int = self._stub_context(BATCH, MICRO_BATCH, SEQUENCES, int(unified))
            return made
        params = self._c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 4096, BATCH, MICRO_BATCH
        params.n_seq_max, params.kv_unified = SEQUENCES, unified
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0  # F32
        params.flash_attn_type = 0
        context = self._c.llama_init_from_model(self._model, params)
        assert context
        return ctypes.cast(context, ctypes.c_void_p).value or 0


@dataclass
class Row:
    """Rows of a batch: a sequence's next tokens, and which of them ask for logits."""

    sequence: int
    tokens: list[int]
    outputs: list[bool]
    prompt: bool


@dataclass
class Sequence:
    """What the program knows of a sequence."""

    rows: list[int] = field(default_factory=list)
    prompt: int = 0  # rows up to its prompt's end; 0: no request
    used: bool = False  # the prompt's logits were
    own: list[int] = field(default_factory=list)  # whose prompt it is; shared with copies
    judged: dict[str, Any] = field(default_factory=dict)  # the prompt as it was judged
    held: list[dict[str, Any]] = field(default_factory=list)  # prompts whose rules stay
    pending: int | None = None  # chosen, not decoded yet
    last: int | None = None  # index of its last row in the last batch
    shared: bool = False  # some of its cells may be another sequence's too
    moved: bool = False  # rows were shifted: their states are no longer those of their tokens


class Program:
    def __init__(self, library: Library, seed: int, output: str) -> None:
        self.library, self.draw = library, random.Random(seed)
        self.contexts: dict[int, dict[str, Any]] = {}
        self.numbers = 0
        self.output = open(output, "w", encoding="utf-8")  # noqa: SIM115
        self.steps = 0

    # ------------------------------------------------------------ contexts

    def open(self, place: int) -> None:
        if place in self.contexts:
            old = self.contexts.pop(place)
            self.library.free(old["context"])
        context = self.library.context(unified=self.draw.random() < 0.6)
        self.contexts[place] = {
            "context": context,
            "memory": self.library.memory(context),
            "observed": False,
            "copying": False,
            "number": None,  # in the order in which they first decode
            "sequences": [Sequence() for _ in range(SEQUENCES)],
            "saved": [],
        }
        self.c = self.contexts[place]

    # ------------------------------------------------------------ one step

    def run(self, steps: int) -> None:
        self.open(0)
        operations = {
            self.prompt: 30, self.answer: 40, self.together: 12, self.drafts: 10, self.copied: 5,
            self.save: 4, self.restore: 4, self.shift: 2, self.clear: 2, self.reopen: 0.1,
            self.look: 3,
        }  # fmt: skip
        kinds, weights = list(operations), list(operations.values())
        while self.steps < steps:
            if self.draw.random() < 0.02:
                place = self.draw.randrange(2)
                if place in self.contexts:
                    self.c = self.contexts[place]
                else:
                    self.open(place)
            self.draw.choices(kinds, weights)[0]()
        self.output.close()

    def pick(self, answering: bool = False) -> int | None:
        numbers = [
            i
            for i, s in enumerate(self.c["sequences"])
            if not answering or (s.pending is not None and len(s.rows) < ROOM)
        ]
        return self.draw.choice(numbers) if numbers else None

    def decode(self, parts: list[Row]) -> None:
        """One batch; the rows of the parts take turns or stand one after the other."""
        order = [(p, i) for p in parts for i in range(len(p.tokens))]
        if len(parts) > 1 and self.draw.random() < 0.5:
            order.sort(key=lambda item: item[1])
        n = len(order)
        token, pos, count = (ctypes.c_int32 * n)(), (ctypes.c_int32 * n)(), (ctypes.c_int32 * n)()
        flags, lists = (ctypes.c_int8 * n)(), (Ints * n)()
        for s in self.c["sequences"]:
            s.last = None
        for index, (part, i) in enumerate(order):
            s = self.c["sequences"][part.sequence]
            token[index], pos[index], count[index] = part.tokens[i], len(s.rows), 1
            flags[index] = part.outputs[i]
            lists[index] = ctypes.cast((ctypes.c_int32 * 1)(part.sequence), Ints)
            s.rows.append(part.tokens[i])
            s.last = index
        if self.c["number"] is None:
            self.c["number"] = self.numbers
            self.numbers += 1
        batch = Batch(n, token, None, pos, count, lists, flags)
        result = self.library.decode(self.c["context"], batch)
        assert result == 0, f"llama_decode: {result}: {b''.join(_last[-3:])!r}"
        self.c["copying"] = False
        self.steps += 1

    def choose(self, sequence: int, index: int, token: int) -> None:
        """Use the logits of a row as servers do: a sampler picks among candidates."""
        self.library.logits(self.c["context"], index)
        data = (Candidate * 1)(Candidate(token, 1.0, 1.0))
        offered = Candidates(data, 1, -1, False)
        self.library.apply(self.library.sampler, ctypes.byref(offered))
        assert offered.selected == 0
        self.used(sequence)

    def used(self, sequence: int) -> None:
        s = self.c["sequences"][sequence]
        if s.used:
            return
        self.c["observed"] = True
        judged = {"ids": s.rows[: s.prompt], "moved": s.moved}
        for other in self.c["sequences"]:
            if other.own is s.own:  # the row's logits are theirs too
                other.used, other.judged = True, judged
        told = {"context": self.c["number"], "sequence": s.own[0], **judged, "held": s.held}
        self.output.write(json.dumps(told) + "\n")

    def letter(self) -> int:
        return END if self.draw.random() < 0.05 else self.draw.choice(LETTERS)

    # ------------------------------------------------------------ prompts

    def new_prompt(self, sequence: int, most: int = ROOM) -> list[int]:
        """Take some rows away, and say which tokens come next, `most` at most."""
        s = self.c["sequences"][sequence]
        kind = self.draw.random()
        if len(s.rows) > ROOM or kind < 0.15:
            self.cut(sequence, 0)
        elif kind < 0.6 and s.rows:
            self.cut(sequence, self.draw.randint(max(0, len(s.rows) - 40), len(s.rows)))
        size = self.draw.choice([1, 2, 3, 8, 9, 17, 31, 32, 33, 40, 65])
        tokens = [self.draw.choice(LETTERS) for _ in range(size)]
        tokens[0] = START
        if size > 2 and self.draw.random() < 0.4:
            tokens.insert(self.draw.choice([0, 0, 7, self.draw.randrange(size)]), END)
        tokens = tokens[:most]
        self.begin(sequence, tokens)
        return tokens

    def begin(self, sequence: int, tokens: list[int]) -> None:
        """What becomes of the request when these tokens come behind it."""
        s = self.c["sequences"][sequence]
        if s.prompt and not s.used:  # the prompt goes on: what was held is held
            s.held = [] if END in (s.rows[-1], *tokens[:-1]) else s.held
        elif s.prompt:
            answer = s.rows[s.prompt :]
            fresh = not answer or END in answer or END in tokens[:-1]
            s.held = [] if fresh else [*s.held, s.judged]
        else:
            s.held = []
        s.used, s.own = False, [sequence]
        s.pending = None
        s.prompt = len(s.rows) + len(tokens)

    def prompt(self) -> None:
        sequence = self.pick()
        assert sequence is not None
        tokens = self.new_prompt(sequence)
        style = self.draw.choice(["last", "chunks", "all", "split"])
        chunks = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
        if style == "split" and len(chunks[-1]) > 1:
            chunks[-1:] = [chunks[-1][:-1], chunks[-1][-1:]]
        for number, chunk in enumerate(chunks):
            final = number == len(chunks) - 1
            outputs = [style == "all"] * len(chunk)
            outputs[-1] = final or style != "last"
            self.decode([Row(sequence, chunk, outputs, True)])
        kind = self.draw.random()
        if kind < 0.15 and style != "all":
            self.several(sequence)
        elif kind < 0.9:  # else it is cancelled
            self.sample(sequence)

    def several(self, sequence: int) -> None:
        """`n > 1`: answers of one prompt, each from the logits of its one last row."""
        index = self.c["sequences"][sequence].last
        self.copied(sequence)
        for number in self.draw.sample(range(SEQUENCES), SEQUENCES):
            s = self.c["sequences"][number]
            same = s.own is self.c["sequences"][sequence].own
            if same and self.draw.random() < 0.8:
                s.pending = self.letter()
                self.choose(number, index, s.pending)

    def sample(self, sequence: int) -> None:
        s = self.c["sequences"][sequence]
        assert s.last is not None
        if self.draw.random() < 0.3:
            token = self.library.sample(self.library.sampler, self.c["context"], s.last)
            self.used(sequence)
            if token != START:
                s.pending = token
                return
            self.cut(sequence, max(0, s.prompt - 1))  # it could be taken for a prompt's start
            return
        s.pending = self.letter()
        self.choose(sequence, s.last, s.pending)

    def answer(self) -> None:
        sequence = self.pick(answering=True)
        if sequence is None:
            return
        for _ in range(self.draw.randint(1, 6)):
            s = self.c["sequences"][sequence]
            if s.pending is None:
                return
            self.decode([Row(sequence, [s.pending], [True], False)])
            s.pending = None
            self.sample(sequence)

    def together(self) -> None:
        """Prompts and answers of several sequences in one batch."""
        parts: list[Row] = []
        for sequence, s in enumerate(self.c["sequences"]):
            if s.pending is not None and len(s.rows) < ROOM and self.draw.random() < 0.7:
                parts.append(Row(sequence, [s.pending], [True], False))
                s.pending = None
            elif self.draw.random() < 0.7:
                tokens = self.new_prompt(sequence, BATCH // SEQUENCES)
                outputs = [False] * (len(tokens) - 1) + [True]
                parts.append(Row(sequence, tokens, outputs, True))
        if not parts:
            return
        self.draw.shuffle(parts)
        self.decode(parts)
        for part in parts:
            self.sample_now(part.sequence)

    def sample_now(self, sequence: int) -> None:
        """Sample from a batch that has rows of others: it cannot be cut."""
        s = self.c["sequences"][sequence]
        assert s.last is not None
        s.pending = self.letter()
        self.choose(sequence, s.last, s.pending)

    def drafts(self) -> None:
        sequence = self.pick(answering=True)
        if sequence is None:
            return
        s = self.c["sequences"][sequence]
        assert s.pending is not None
        guess = [self.draw.choice(LETTERS) for _ in range(self.draw.randint(1, 5))]
        start = len(s.rows)
        self.decode([Row(sequence, [s.pending, *guess], [True] * (len(guess) + 1), False)])
        accepted = self.draw.randint(0, len(guess))
        for i in range(accepted):
            self.choose(sequence, i, guess[i])
        others = [t for t in LETTERS if accepted == len(guess) or t != guess[accepted]]
        s.pending = self.draw.choice(others)
        self.choose(sequence, accepted, s.pending)
        if accepted < len(guess):
            self.cut(sequence, start + 1 + accepted, keep=True)

    def look(self) -> None:
        """Reading all logits at once is no use."""
        if self.c["observed"]:
            self.library.all_logits(self.c["context"])

    # ------------------------------------------------------------ the cache

    def cut(self, sequence: int, rows: int, keep: bool = False) -> None:
        s = self.c["sequences"][sequence]
        if rows >= len(s.rows) and rows:
            return
        self.library.remove(self.c["memory"], sequence, rows, -1)
        self.steps += 1
        del s.rows[rows:]
        if rows < s.prompt:
            s.prompt, s.used, s.held = 0, False, []
        if not keep:
            s.pending = None
        s.last = None
        s.moved, s.shared = s.moved and rows > 0, s.shared and rows > 0

    def copied(self, source: int | None = None) -> None:
        """Another sequence becomes a copy of this one."""
        if self.c["number"] is None or self.c["copying"]:
            return
        # llama.cpp copies caches of their own before the next batch: states are not true till then.
        self.c["copying"] = True
        source = self.draw.randrange(SEQUENCES) if source is None else source
        target = self.draw.choice([i for i in range(SEQUENCES) if i != source])
        s = self.c["sequences"][source]
        self.cut(target, 0)
        self.library.copy(self.c["memory"], source, target, -1, -1)
        self.steps += 1
        s.shared = True
        if not s.prompt:
            copy = Sequence(rows=list(s.rows), moved=s.moved, shared=True)
            self.c["sequences"][target] = copy
            return
        self.c["sequences"][target] = replace(s, rows=list(s.rows), held=list(s.held), last=None)

    def save(self) -> None:
        sequence = self.pick()
        assert sequence is not None
        if not self.c["sequences"][sequence].rows or self.c["copying"]:
            return  # llama.cpp leaves what is there where a state holds no rows
        size = self.library.state_size(self.c["context"], sequence)
        data = (ctypes.c_uint8 * size)()
        assert self.library.get_state(self.c["context"], data, size, sequence) == size
        s = self.c["sequences"][sequence]
        copy = replace(s, rows=list(s.rows), held=list(s.held), own=list(s.own), last=None)
        copy.shared = False
        self.c["saved"] = [*self.c["saved"][-3:], (data, copy)]
        self.steps += 1

    def restore(self) -> None:
        if not self.c["saved"] or self.c["copying"]:
            return
        sequence = self.draw.randrange(SEQUENCES)
        data, copy = self.draw.choice(self.c["saved"])
        assert self.library.set_state(self.c["context"], data, len(data), sequence) == len(data)
        lists = {"rows": list(copy.rows), "held": list(copy.held), "own": list(copy.own)}
        self.c["sequences"][sequence] = replace(copy, **lists)
        self.steps += 1

    def shift(self) -> None:
        """A context shift in an answer: rows in the middle leave, those behind them move up."""
        sequence = self.pick(answering=True)
        if sequence is None:
            return
        s = self.c["sequences"][sequence]
        if len(s.rows) < 12 or s.shared:  # positions belong to cells
            return
        first = self.draw.randint(1, len(s.rows) // 2)
        count = self.draw.randint(1, len(s.rows) // 3)
        memory = self.c["memory"]
        self.library.remove(memory, sequence, first, first + count)
        self.library.add(memory, sequence, first + count, -1, -count)
        self.steps += 2
        del s.rows[first : first + count]
        s.prompt -= max(0, min(first + count, s.prompt) - first)
        s.moved, s.last = True, None

    def clear(self) -> None:
        self.library.clear(self.c["memory"], True)
        self.c["sequences"] = [Sequence() for _ in range(SEQUENCES)]
        self.steps += 1

    def reopen(self) -> None:
        self.open(next(place for place, c in self.contexts.items() if c is self.c))


if __name__ == "__main__":
    kind, path, seed, steps, output = sys.argv[1:]
    program = Program(Library(kind, path), int(seed), output)
    program.run(int(steps))
    print(json.dumps({"steps": program.steps}))
