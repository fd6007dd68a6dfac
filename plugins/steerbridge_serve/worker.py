"""One thread owns the model; jobs wait for it in a queue.

A job is queued, running, ended or cancelled. Whatever happens to it, the last of its events says
how it ended, so nobody waits for ever. Who may queue is decided before (`admission.py`).
"""

from __future__ import annotations

import asyncio
import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.serving import Cancelled, Engine, Prompt, Question, Sampling, Token
from steerbridge_serve.text import Text


@dataclass(frozen=True, slots=True)
class Step:
    """A token, the text that can be sent after it, and the outcome once it is known."""

    token: Token
    text: str
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: `eos_token`, `length` or `stop_sequence`.
        text: what was held back until now.
        tokens: of the answer, the one that ended it included.
        prompt_ns, answer_ns: nanoseconds until the first token, and from there to the last.
    """

    reason: str
    text: str
    prompt_tokens: int
    tokens: int
    outcome: Outcome | None
    prompt_ns: int
    answer_ns: int


class State(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    CANCELLED = "cancelled"


Event = Step | Finish | Prompt | BaseException


@dataclass(slots=True, eq=False)
class Job:
    """One answer, or with `sampling` None only the prompt's tokens. Its events are read on the
    event loop that created it. That loop is woken for a token only if somebody waits for it:
    two cores that compute the next one are slower with a third thread between them."""

    ask: Callable[[], Question]  # called on the model's thread: it decodes pictures
    sampling: Sampling | None
    text: Text = field(default_factory=lambda: Text((), includes=False))
    state: State = State.QUEUED
    outcome: Outcome | None = None
    tokens: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: deque[Event] = field(default_factory=deque)
    _last: bool = False  # the last of the events is there
    _awaited: bool = False  # somebody waits for the next one
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, event: Event) -> None:
        """Add an event; called on the model's thread."""
        self._events.append(event)
        if not isinstance(event, Step):
            self._last = True
        # Who waits says so first and looks again after: no event is missed between the two.
        if (self._last or self._awaited) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def event(self) -> Step | Finish | Prompt:
        """The next event.

        Raises: what the engine raised; Cancelled.
        """
        self._awaited = True
        while not self._events:
            await self._woken.wait()
            self._woken.clear()
        self._awaited = False
        event = self._events.popleft()
        if isinstance(event, BaseException):
            raise event
        return event

    async def ended(self) -> None:
        """Wait until the last event is there."""
        while not self._last:
            await self._woken.wait()
            self._woken.clear()


class Worker:
    """Answers jobs one at a time, in the order in which they came."""

    def __init__(self, engine: Engine, hold_back: int | None = None) -> None:
        """`hold_back`: tokens by which an answer is told later, so that those in which a probe
        fires are never shown; None: the longest window of a probe that reads answers."""
        self.engine = engine
        self.hold_back = _longest(engine.package) if hold_back is None else hold_back
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._running: Job | None = None
        self._thread = threading.Thread(target=self._run, name="steerbridge-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Queue a job. While the worker closes, it is cancelled instead."""
        with self._changed:
            self._jobs.append(job)
            if self._closing:
                self._cancel(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, at the next token or batch of its prompt if it runs."""
        with self._changed:
            self._cancel(job)

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._closing = True
            for job in [*self._jobs, *([self._running] if self._running else [])]:
                self._cancel(job)
            self._changed.notify()
        self._thread.join()

    def _cancel(self, job: Job) -> None:
        if job.state is State.QUEUED:
            self._jobs.remove(job)
            job.put(Cancelled())
        if job.state in (State.QUEUED, State.RUNNING):
            job.state = State.CANCELLED

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                event: Event = self._answered(job)
            except BaseException as error:  # told to the client; the next job is not affected
                event = error
            with self._changed:
                self._running = None
                if job.state is State.RUNNING:
                    job.state = State.ENDED
            job.put(event)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._jobs and not self._closing:
                self._changed.wait()
            if not self._jobs:
                return None
            job = self._running = self._jobs.popleft()
            job.state = State.RUNNING
            return job

    def _answered(self, job: Job) -> Event:
        question = job.ask()
        if job.sampling is None:
            return self.engine.prompt(question)
        begun = first = time.perf_counter_ns()
        held: deque[Token] = deque()

        def tell(outcome: Outcome | None, left: int) -> None:
            """Tell tokens until so many are left."""
            while len(held) > left:
                token = held.popleft()
                job.put(Step(token, job.text.add(token), outcome))

        def check() -> None:
            if job.state is State.CANCELLED:
                raise Cancelled

        def emit(token: Token, outcome: Outcome | None) -> bool:
            nonlocal first
            if not job.tokens:
                first = time.perf_counter_ns()
            job.tokens += 1
            if _fires_now(job.outcome, outcome):
                held.clear()
            job.outcome = outcome
            held.append(token)
            tell(outcome, 0 if outcome is not None and outcome.fired else self.hold_back)
            check()
            return not job.text.stopped

        check()
        ended = self.engine.answer(question, job.sampling, emit, check)
        job.outcome = ended.outcome
        tell(ended.outcome, 0)
        rest = job.text.end()
        reason = "stop_sequence" if job.text.stopped else ended.finish
        times = (first - begun, time.perf_counter_ns() - first)
        return Finish(reason, rest, ended.prompt_tokens, job.tokens, ended.outcome, *times)


def _longest(package: SteeringPackage) -> int:
    """The longest window of a probe that reads answers; 0 without one."""
    readings = [probe.token_reading for probe in package.spec.probes]
    return max((r.window for r in readings if r is not None and r.scope != "prompt"), default=0)


def _fires_now(before: Outcome | None, now: Outcome | None) -> bool:
    """Whether a rule has fired in the answer since the last token."""
    return before is not None and now is not None and now.fired and not before.fired
