"""One thread owns the model; a bounded queue stands before it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from steerbridge.errors import SteerbridgeError
from steerbridge.runtime import Outcome
from steerbridge_serve.engines import Ended, Engine, Question, Sampling, Token


class Overloaded(SteerbridgeError):
    """The queue is full; try again later."""


@dataclass(frozen=True, slots=True)
class Step:
    """A token and, once known, the verdict."""

    token: Token
    outcome: Outcome | None


Event = Step | Ended | BaseException


@dataclass(slots=True)
class Job:
    """A request under way. Its events are read on the loop it was made on."""

    question: Question
    sampling: Sampling
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits any more: it ends at its next token, or is never begun."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        """From the worker's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Step | Ended]:
        """Steps, and `Ended` as the last one.

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
    """Answers jobs one after the other.

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
            Overloaded: as many as may wait do so.
        """
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Overloaded("the queue is full") from None

    def close(self) -> None:
        """End the thread after the jobs that wait."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if not job.cancelled:
                self._answer(job)

    def _answer(self, job: Job) -> None:
        def emit(token: Token, outcome: Outcome | None) -> bool:
            job.tell(Step(token, outcome))
            return not job.cancelled

        try:
            job.tell(self.engine.answer(job.question, job.sampling, emit))
        except Exception as error:  # the next job may do better
            job.tell(error)
