"""What all dialects share: a request becomes jobs, and these become answers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from fastapi import Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from steerbridge.errors import SteerbridgeError, UnsupportedFeature
from steerbridge.runtime import Outcome
from steerbridge.serving import Prompt
from steerbridge_serve import pictures
from steerbridge_serve.asked import Asked, RefusedTurns, Turn
from steerbridge_serve.problems import NotAllowed, trouble
from steerbridge_serve.text import Text
from steerbridge_serve.worker import Finish, Job, Step, Worker

LOG: Final = logging.getLogger("steerbridge_serve")
FIRED: Final = "X-Steerbridge-Fired"
RUNS: Final = "steerbridge.runs"
"""Key of an ASGI scope: what is to be closed when the request is over, however that comes."""
RAW: Final = (
    "guards are trained on chats, and this is {}: ask POST /v1/chat/completions or /api/chat, or "
    "start the server with --raw-prompts"
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What clients may ask for."""

    unsteered: bool = False  # answers without the package
    raw_prompts: bool = False  # raw prompts, and answers that the client begins
    show_scores: bool = False
    pictures: int = 16  # in a request
    pixels: int = 16_000_000  # of all of them


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self, worker: Worker) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "steerbridge_requests", "Requests by status", ["status"], registry=own
        )
        self.verdicts = Counter(
            "steerbridge_verdicts", "Verdicts on prompts", ["fired"], registry=own
        )
        self.fired = Counter(
            "steerbridge_fired", "Answers in which a rule fired", ["fired_in"], registry=own
        )
        self.tokens = Counter("steerbridge_tokens", "Tokens generated", registry=own)
        self.seconds = Histogram(
            "steerbridge_request_seconds", "Seconds from arrival to end", registry=own
        )
        waiting = Gauge("steerbridge_waiting", "Requests in the queue", registry=own)
        waiting.set_function(lambda: worker.waiting)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    steps: Sequence[Step]
    finish: Finish


class Run:
    """The answers to one request, in the making."""

    def __init__(self, asked: Asked, sent: Sequence[Turn], jobs: Sequence[Job]) -> None:
        self.asked, self.jobs = asked, jobs
        self.sent = sent
        self._first: Step | Finish | None = None

    async def first(self) -> Step | Finish:
        """The first event: the verdict is known with it."""
        if self._first is None:
            self._first = await _event(self.jobs[0])
        return self._first

    async def events(self) -> AsyncIterator[tuple[int, Step | Finish]]:
        """All events, each with the number of its answer. Answers come one after the other."""
        for index, job in enumerate(self.jobs):
            event = await (_event(job) if index else self.first())
            yield index, event
            while not isinstance(event, Finish):
                event = await _event(job)
                yield index, event

    async def answers(self) -> list[Answer]:
        """All answers, once they are whole."""
        done = []
        for index, job in enumerate(self.jobs):
            await job.ended()
            steps: list[Step] = []
            event = await (_event(job) if index else self.first())
            while not isinstance(event, Finish):
                steps.append(event)
                event = await _event(job)
            done.append(Answer(job.text.whole, steps, event))
        return done


async def _event(job: Job) -> Step | Finish:
    event = await job.event()
    assert not isinstance(event, Prompt)
    return event


class Service:
    """One worker, and what clients may ask of it."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.engine, self.settings = worker.engine, settings
        self.metrics = Metrics(worker)
        self._worker = worker
        self._refused = RefusedTurns()
        evidence = worker.engine.package.spec.evidence
        self._forms = (evidence and evidence.forms) or ("chat",)

    def start(self, asked: Asked, request: Request) -> Run:
        """Queue the answers to a request; they are cancelled when it is over.

        Raises:
            NotAllowed, DataError, UnsupportedFeature: it is not answered.
        """
        asked, sent = self._allowed(asked)
        jobs = [self._job(asked, index) for index in range(asked.count)]
        run = Run(asked, sent, jobs)
        request.scope[RUNS].append(partial(self._close, run))
        for job in jobs:
            self._worker.submit(job)
        return run

    async def prompt(self, asked: Asked, request: Request) -> Prompt:
        """The prompt of a request, as the model would receive it.

        Raises: as `start`.
        """
        asked.check(self.engine.context, 0)
        job = Job(partial(asked.question, self._decode), None)
        request.scope[RUNS].append(partial(self._worker.cancel, job))
        self._worker.submit(job)
        prompt = await job.event()
        assert isinstance(prompt, Prompt)
        return prompt

    def steering(self, outcome: Outcome | None, asked: Asked) -> dict[str, Any] | None:
        """What an answer says of its verdict; scores only if the server shows them, because with
        them a prompt can be changed until it passes."""
        if outcome is None:
            return None
        told = outcome.to_json(scores=self.settings.show_scores)
        if asked.form not in self._forms:
            told["untrained_form"] = asked.form
        if asked.dropped:
            told["dropped_turns"] = asked.dropped
        return told

    def headers(self, outcome: Outcome | None) -> dict[str, str]:
        """HTTP headers of an answer."""
        return {} if outcome is None else {FIRED: str(outcome.fired).lower()}

    async def streamed(
        self, run: Run, path: str, lines: AsyncIterator[Any], *, events: bool
    ) -> StreamingResponse:
        """Respond once the first token exists: the verdict is then known, and an earlier error has
        its own HTTP status. A later error is sent in the stream.

        Args:
            lines: objects that are sent as JSON, or texts.
            events: as server-sent events; else one a line.
        """
        first = await run.first()
        head, tail = ("data: ", "\n\n") if events else ("", "\n")

        async def body() -> AsyncIterator[str]:
            try:
                async for line in lines:
                    text = line if isinstance(line, str) else json.dumps(line)
                    yield head + text + tail
            except Exception as error:
                if not isinstance(error, SteerbridgeError):
                    LOG.exception("an answer failed")
                yield head + json.dumps(trouble(error).body(path)) + tail

        kind = "text/event-stream" if events else "application/x-ndjson"
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            body(), headers=headers | self.headers(first.outcome), media_type=kind
        )

    # -------------------------------------------------------- inside

    def _allowed(self, asked: Asked) -> tuple[Asked, Sequence[Turn]]:
        """The request without refused turns, and the turns that were sent."""
        settings, engine = self.settings, self.engine
        if not asked.steered and not settings.unsteered:
            text = "steering: unsteered answers are off (--allow-unsteered)"
            raise NotAllowed(403, text)
        if not settings.raw_prompts and asked.form in ("raw", "prefill"):
            what = "a raw prompt" if asked.form == "raw" else "an answer begun by the client"
            raise NotAllowed(422, RAW.format(what))
        asked.check(engine.context, settings.pictures)
        if asked.pictures and not engine.vision:
            raise UnsupportedFeature(engine.name, "pictures: this model takes none")
        if not asked.answered:
            return asked, ()
        kept, dropped = self._refused.without(asked.turns)
        return replace(asked, turns=kept, dropped=dropped), asked.turns

    def _job(self, asked: Asked, index: int) -> Job:
        sampling = asked.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + index)
        text = Text(asked.stops, includes=asked.keeps_stop)
        return Job(partial(asked.question, self._decode), sampling, text)

    def _decode(self, files: Sequence[bytes]) -> list[Any]:
        return list(pictures.decode(files, self.settings.pixels))

    def _close(self, run: Run) -> None:
        """The request is over: cancel what is left of it, and remember what was refused."""
        for job in run.jobs:
            self._worker.cancel(job)
            self.metrics.tokens.inc(job.tokens)
            if job.outcome is None:
                continue
            self.metrics.verdicts.labels(str(job.outcome.fired).lower()).inc()
            if job.outcome.fired:
                place = job.outcome.fired_in(self.engine.package.spec)
                self.metrics.fired.labels(place).inc()
            if job.outcome.fired and run.sent:
                self._refused.add(run.sent, run.asked.prefill + job.text.whole)


def once(closing: Sequence[Callable[[], None]]) -> None:
    """Call all of them, whatever one of them raises."""
    for close in closing:
        try:
            close()
        except Exception:
            LOG.exception("the end of a request failed")


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
