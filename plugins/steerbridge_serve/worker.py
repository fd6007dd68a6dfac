"""One thread owns the model; jobs wait for it in a bounded queue."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from steerbridge.errors import SteerbridgeError
from steerbridge.runtime import Outcome
from steerbridge.serving import Ended, Engine, Question, Sampling, Token


class Overloaded(SteerbridgeError):
    """The queue is full; try again later."""


@dataclass(frozen=True, slots=True)
class Step:
    """A token, and the outcome once it is known."""

    token: Token
    outcome: Outcome | None


Event = Step | Ended | BaseException


@dataclass(slots=True)
class Job:
    """A request in progress. Its events are read on the event loop that created it."""

    question: Question
    sampling: Sampling
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Cancel: the job stops at its next token, or never starts."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, event: Event) -> None:
        """Add an event; called on the worker's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Step | Ended]:
        """The steps, then `Ended`.

        Raises: what the engine raised.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Ended):
                return


class Worker:
    """Answers jobs one at a time.

    Args:
        waiting: jobs that may wait while one is answered.
    """

    def __init__(self, engine: Engine, waiting: int) -> None:
        self.engine, self.size = engine, waiting
        self._queue: queue.Queue[Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="steerbridge-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Overloaded: the queue is full.
        """
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Overloaded("the queue is full") from None

    def close(self) -> None:
        """End the thread after the queued jobs."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if not job.cancelled:
                self._answer(job)

    def _answer(self, job: Job) -> None:
        def emit(token: Token, outcome: Outcome | None) -> bool:
            job.put(Step(token, outcome))
            return not job.cancelled

        try:
            job.put(self.engine.answer(job.question, job.sampling, emit))
        except Exception as error:  # reported to the client; the next job is not affected
            job.put(error)
