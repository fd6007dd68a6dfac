"""A stand-in for vLLM's engine on the tiny model in numpy: paged blocks, prefixes that are shared,
prompts in parts, guesses that are taken back, and preemption. It drives the plugin's gates as the
first model runner does, with rows of several requests in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch

from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.testing.model import EOS, LAYERS, WIDTH, Cache, TinyModel
from steerbridge_vllm.gates import Gates
from steerbridge_vllm.rows import Part
from steerbridge_vllm.several import Several

BLOCK = 4
BLOCKS = 4096


@dataclass
class Request:
    """One request; `rows` of its sequence are computed."""

    name: str
    prompt: list[int]
    new: int
    answer: list[int] = field(default_factory=list)
    rows: int = 0
    blocks: list[int] = field(default_factory=list)
    cache: Cache = field(default_factory=Cache)
    outcome: Outcome | None = None
    package: int = 0

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def ended(self) -> bool:
        return len(self.answer) >= self.new or EOS in self.answer


class Engine:
    """A batch of requests.

    Args:
        packages: of which each request has one, by its place.
        cached: whether prefixes are shared.
        back: how many rows in front of a prompt's last one are never taken from the cache.
    """

    def __init__(
        self, model: TinyModel, *packages: SteeringPackage, cached: bool, back: int = 0
    ) -> None:
        self._model, self._cached, self._back = model, cached, back

        def gates(package: SteeringPackage) -> Any:
            return lambda mine: Gates(
                package,
                torch.device("cpu"),
                lambda values: values,
                lambda _, prompt: np.zeros(prompt, np.bool_),
                cached=cached,
                mine=mine,
            )

        self.gates = Several({str(i): gates(package) for i, package in enumerate(packages)})
        if self.gates.keeps_rows:
            self.gates.allocate(BLOCKS, BLOCK)
        self._free = iter(range(1, BLOCKS))
        self._known: dict[tuple[int, ...], tuple[int, Cache]] = {}  # whole blocks by their prefix

    def place(self, request: Request) -> None:
        """Begin a request, or begin it again: blocks that are known, then new ones."""
        request.blocks, request.cache, request.rows = [], Cache(), 0
        self.gates.choose(request.name, str(request.package))
        ids = request.ids
        while self._cached and request.rows + BLOCK <= len(ids) - 1 - self._back:
            known = self._known.get(tuple(ids[: request.rows + BLOCK]))
            if known is None:
                break
            request.blocks.append(known[0])
            request.cache = _copied(known[1])
            request.rows += BLOCK

    def step(self, work: Sequence[tuple[Request, int, Sequence[int]]]) -> None:
        """One pass: so many rows of each request, the last of them guesses."""
        parts, states, first = [], [], 0
        caches = []
        for request, count, guesses in work:
            stop = request.rows + count
            while len(request.blocks) * BLOCK < stop:
                request.blocks.append(next(self._free))
            ids = [*request.ids, *guesses][request.rows : stop]
            table = np.array([*request.blocks, 0, 0], np.int32)
            parts.append(
                Part(
                    request.name,
                    first,
                    count,
                    request.rows,
                    len(request.prompt),
                    len(guesses),
                    table,
                )
            )
            caches.append((_copied(request.cache), ids))
            first += count
        self.gates.begin(parts)
        if len(work) == 1:  # rewritten rows reach the later blocks
            states = [self._model.forward(caches[0][1], caches[0][0], self._edit)[0]]
            work[0][0].cache = caches[0][0]
        else:
            for (request, _, _), (cache, ids) in zip(work, caches, strict=True):
                states.append(self._model.forward(ids, cache)[0])
                request.cache = cache
            for depth in self.gates.depths:
                self._visit(depth, np.concatenate([s[depth] for s in states]))
        self._sample(work, parts, np.concatenate([s[LAYERS + 1] for s in states]))

    def _edit(self, depth: int, rows: Any) -> Any:
        return self._visit(depth, rows) if depth in self.gates.depths else rows

    def _visit(self, depth: int, rows: Any) -> Any:
        """The stream in two parts, with two rows of padding."""
        padded = torch.from_numpy(np.concatenate([rows, np.zeros((2, WIDTH), np.float32)]))
        if depth % 2:
            self.gates.visit(depth, padded, None)
            return padded[: len(rows)].numpy()
        half = torch.zeros_like(padded)
        self.gates.visit(depth, padded, half)
        return (padded + half)[: len(rows)].numpy()

    def _sample(self, work: Any, parts: Sequence[Part], head: Any) -> None:
        self.gates.finish(torch.from_numpy(np.concatenate([head, head[:2]])))
        at = [
            part.first + part.count - part.drafts - 1 + k
            for part in parts
            for k in range(part.drafts + 1)
        ]
        rows = self.gates.at_head(torch.from_numpy(head[at])).numpy()
        with np.errstate(all="ignore"):
            logits = rows @ self._model.weights["head"].T
        best = [int(row.argmax()) if np.isfinite(row).any() else 0 for row in logits]
        said = self.gates.said()
        best = [said.get(i, token) for i, token in enumerate(best)]
        accepted, row = {}, 0
        for (request, _, guesses), part in zip(work, parts, strict=True):
            found, row = best[row : row + part.drafts + 1], row + part.drafts + 1
            taken = 0
            while taken < len(guesses) and guesses[taken] == found[taken]:
                taken += 1
            accepted[request.name] = taken
            request.rows = part.certain + taken
            request.cache = _cut(request.cache, request.rows)
            if part.certain >= len(request.ids):
                request.answer += found[: taken + 1]
            self._note(request)
        outcomes = self.gates.end(accepted)
        for request, _, _ in work:
            request.outcome = outcomes.get(request.name, request.outcome)

    def _note(self, request: Request) -> None:
        """Whole blocks whose tokens are known may be shared."""
        for stop in range(BLOCK, min(request.rows, len(request.ids)) + 1, BLOCK):
            key = tuple(request.ids[:stop])
            block = request.blocks[stop // BLOCK - 1]
            self._known.setdefault(key, (block, _cut(request.cache, stop)))


def _copied(cache: Cache) -> Cache:
    return Cache(list(cache.keys), list(cache.values))


def _cut(cache: Cache, rows: int) -> Cache:
    return Cache([k[:rows] for k in cache.keys], [v[:rows] for v in cache.values])


def run(engine: Engine, requests: Sequence[Request], draw: Random, *, together: int) -> None:
    """Answer all requests, in passes that are drawn: who takes part, in what order, how far."""
    waiting, live = list(requests), list[Request]()
    while waiting or live:
        while waiting and len(live) < together and (not live or draw.random() < 0.5):
            live.append(waiting.pop(0))
            engine.place(live[-1])
        if live and draw.random() < 0.1:
            engine.place(draw.choice(live))  # preempted
        some = [request for request in live if draw.random() < 0.8] or live[:1]
        draw.shuffle(some)
        work = []
        for request in some:
            left = len(request.ids) - request.rows
            guesses: list[int] = []
            if left == 1 and request.answer and draw.random() < 0.5:
                guesses = [draw.randrange(32, 127) for _ in range(draw.randint(1, 3))]
            count = draw.randint(1, left) if left > 1 else left + len(guesses)
            work.append((request, count, guesses))
        engine.step(work)
        engine.gates.forget(r.name for r in live if r.ended)
        live = [request for request in live if not request.ended]
