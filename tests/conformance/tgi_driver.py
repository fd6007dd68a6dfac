"""The kit's driver for the TGI plugin, on the simulator of TGI's flash classes (tests/flash.py).

TGI's router is not part of the simulator, so this driver does what a router does: it cuts prompts
into chunks, lets requests join a batch that is decoding, filters out those that end, proposes
drafts, and shares the cached prefixes of earlier prompts where a shape asks to keep the cache.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash
from steerbridge.package import SteeringPackage
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome
from steerbridge.testing.driver import Ability, Files, How, Reply
from steerbridge.testing.model import TinyModel
from steerbridge_tgi import attach

CHUNK: Final = 16  # rows of a prompt in one pass
DRAFTS: Final = 2  # tokens that are proposed in each pass
GRAPHS: Final = (4, 16)  # rows of the passes that are captured


class Server:
    """A service with a package, or without one. Requests have new ids.

    Args:
        prefixes: rows of earlier prompts are used again, as with PREFIX_CACHING=1.
    """

    def __init__(self, service: Any, package: SteeringPackage | None, prefixes: bool) -> None:
        self.service, self._package, self._prefixes = service, package, prefixes
        self._events = Path(os.environ["STEERBRIDGE_EVENTS"])
        self._ids = itertools.count(1)
        self._earlier: list[flash.Request] = []
        self._slots = itertools.count(1)  # slot 0 is nobody's

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        if not self._prefixes:
            self._slots = itertools.count(1)
        requests = [self._request(TinyModel.encode(prompt), new) for prompt in prompts]
        before = len(self._verdicts())
        self._answer(requests, how.cancel_after or new, how)
        if self._prefixes:
            self._earlier += requests
        outcomes = {e["request"]: self._outcome(e) for e in self._verdicts()[before:]}
        return [self._reply(request, outcomes, new) for request in requests]

    def _request(self, prompt: list[int], new: int) -> flash.Request:
        shared = max((_shared(e.prompt, prompt) for e in self._earlier), default=0)
        same = next((e for e in self._earlier if _shared(e.prompt, prompt) == shared), None)
        slots = same.slots[:shared] if same else []
        slots += itertools.islice(self._slots, len(prompt) - shared + new + DRAFTS)
        return flash.Request(next(self._ids), prompt, slots, rows=shared)

    def _answer(self, requests: list[flash.Request], new: int, how: How) -> None:
        """Run passes until every request has its tokens, or was given up.

        Requests of one batch start together; those of several clients one pass after another.
        """
        waiting, live = list(requests), list[flash.Request]()
        while waiting or live:
            arriving = 1 if how.threads else len(waiting)
            live, waiting = live + waiting[:arriving], waiting[arriving:]
            drafts = DRAFTS if how.drafts == "ngram" and not _prefilling(live) else 0
            flash.step(self.service.model, [_work(request, drafts) for request in live])
            live = [request for request in live if len(request.answer) < new]
            self._filter(live)

    def _filter(self, live: list[flash.Request]) -> None:
        """What the router asks for when requests end or are cancelled."""
        self.service.cache.cache = {1: SimpleNamespace(requests=live)}
        asyncio.run(self.service.FilterBatch(None, None))

    def _verdicts(self) -> list[dict[str, Any]]:
        """The plugin's events so far, of the kind `verdict`."""
        if not self._events.is_file():
            return []
        events = map(json.loads, self._events.read_text("utf-8").splitlines())
        return [event for event in events if event["event"] == "verdict"]

    def _outcome(self, event: Any) -> Outcome:
        assert self._package is not None
        verdicts = []
        for told, probe in zip(event["probes"], self._package.spec.probes, strict=True):
            score = math.nan if told["score"] is None else told["score"]
            verdict = Verdict(
                told["probe"],
                score,
                told["threshold"],
                probe.comparator,
                told["fired"],
                told.get("unjudged", ""),
                told.get("fired_in", ""),
                told.get("row"),
            )
            verdicts.append(verdict)
        return Outcome(tuple(verdicts), tuple(event["fired"]))

    def _reply(self, request: flash.Request, outcomes: dict[int, Outcome], new: int) -> Reply:
        assert request.logits is not None
        # A pass of drafts may add more tokens than were asked for; the router cuts them off.
        tokens = tuple(request.answer[:new])
        if self._package is None:
            return Reply(tokens, None, request.logits.numpy())
        assert request.id in outcomes, f"no verdict on request {request.id} among the events"
        return Reply(tokens, outcomes[request.id], request.logits.numpy())


class Running:
    """The ordinary server; and one that caches prefixes, where a shape asks to keep the cache."""

    def __init__(self, opened: Callable[[bool], Server]) -> None:
        self._opened = opened
        self._plain = opened(False)
        self._caching: Server | None = None

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        if not how.keep:
            return self._plain.ask(prompts, new, how)
        self._caching = self._caching or self._opened(True)
        return self._caching.ask(prompts, new, how)

    def break_hook(self) -> None:
        """Clear every hook of the model, as another plugin that cleans up might."""
        for module in self._plain.service.model.model.modules():
            module._forward_pre_hooks.clear()


def _shared(earlier: Sequence[int], prompt: Sequence[int]) -> int:
    """Rows of a prompt that need not be evaluated again; its last one always is."""
    pairs = zip(earlier, prompt[:-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _prefilling(requests: Sequence[flash.Request]) -> bool:
    return any(request.rows < len(request.prompt) for request in requests)


def _work(request: flash.Request, drafts: int) -> flash.Work:
    left = len(request.prompt) - request.rows
    if left > 0:
        return flash.Work(request, min(left, CHUNK))
    return flash.Work(request, 1 + drafts, _guesses(request, drafts))


def _guesses(request: flash.Request, count: int) -> tuple[int, ...]:
    """What followed the last token when it came before: TGI's n-gram speculation."""
    known = [*request.prompt, *request.answer]
    before = [i for i, token in enumerate(known[:-1]) if token == known[-1]]
    guesses = known[before[-1] + 1 :][:count] if before else []
    return (*guesses, *[known[-1]] * (count - len(guesses)))


class TgiDriver:
    """The plugin on the simulator: F32 on the CPU, prompts in chunks, answers from graphs."""

    name = "tgi"
    against = "simulator"
    abilities = frozenset(
        {
            Ability.BATCH,
            Ability.CONVERSATION,
            Ability.UNENDED,
            Ability.CANCEL,
            Ability.THREADS,
            Ability.NGRAM_DRAFTS,
            Ability.LOGITS,
            Ability.BREAK,
            Ability.RESTART,
        }
    )
    batch = CHUNK
    context = flash.CONTEXT - 8  # the router refuses longer prompts: it is not simulated
    tolerance = 1e-4
    margin = 1e-3
    tells_the_end = True
    kept_open = 0

    @contextmanager
    def open(self, files: Files, package: SteeringPackage | None) -> Iterator[Running]:
        def opened(prefixes: bool) -> Server:
            llama = AutoModelForCausalLM.from_pretrained(files.transformers, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(files.transformers)
            service = flash.service(flash.FlashCausalLM(llama, GRAPHS, tokenizer))
            os.environ["PREFIX_CACHING"] = str(int(prefixes))
            if package is not None:
                attach.attach(service, str(package.save(Path(folder, f"{prefixes}.gguf"))))
            service.model.warmup()
            return Server(service, package, prefixes)

        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory(prefix="steerbridge-tgi-") as folder, ExitStack() as stack:
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1)  # the model is tiny
            variables = {"STEERBRIDGE_EVENTS": str(Path(folder, "events.jsonl"))}
            modules = flash.server_modules(GRAPHS, DRAFTS)
            with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ, variables):
                yield Running(opened)
