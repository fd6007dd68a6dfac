"""Parts of `steerbridge serve` without HTTP: its queue, and stop sequences."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerbridge.serving import Ended, Question, Sampling, Token
from steerbridge_serve.answers import Text
from steerbridge_serve.worker import Job, Overloaded, Worker


class Slow:
    """An engine that produces a token only when the test releases it."""

    name, context, vision = "slow", 100, False

    def __init__(self):
        self.go = threading.Semaphore(0)
        self.begun = []

    def answer(self, question, sampling, emit):
        self.begun.append(question.prompt)
        for n in range(sampling.max_new_tokens):
            self.go.acquire()
            if not emit(Token(n, b"x"), None):
                return Ended("stopped", 1, None)
        return Ended("length", 1, None)


def test_the_queue_is_bounded_and_cancelled_jobs_are_never_begun():
    engine = Slow()
    worker = Worker(engine, 2)

    async def run():
        jobs = [Job(Question(prompt=str(n)), Sampling(2)) for n in range(4)]
        worker.submit(jobs[0])
        while not engine.begun:
            await asyncio.sleep(0.01)
        worker.submit(jobs[1])
        worker.submit(jobs[2])
        with pytest.raises(Overloaded):
            worker.submit(jobs[3])
        jobs[1].cancel()
        engine.go.release(4)
        return [[type(e).__name__ async for e in j.events()] for j in (jobs[0], jobs[2])]

    assert asyncio.run(run()) == [["Step", "Step", "Ended"]] * 2
    worker.close()
    assert engine.begun == ["0", "2"]


def test_an_engine_that_fails_fails_one_request():
    class Broken(Slow):
        def answer(self, question, sampling, emit):
            if question.prompt == "bad":
                raise RuntimeError("no")
            return Ended("length", 1, None)

    worker = Worker(Broken(), 2)

    async def run(prompt):
        job = Job(Question(prompt=prompt), Sampling(1))
        worker.submit(job)
        return [e async for e in job.events()]

    with pytest.raises(RuntimeError, match="no"):
        asyncio.run(run("bad"))
    assert len(asyncio.run(run("good"))) == 1
    assert worker.alive
    worker.close()


@given(
    st.text(alphabet="abé€", max_size=12),
    st.lists(st.text(alphabet="abé€", min_size=1, max_size=3), max_size=3),
    st.integers(1, 3),
    st.booleans(),
)
def test_text_ends_at_the_first_stop_sequence(text, stop, size, includes):
    raw = text.encode()
    stopping = Text(stop, includes)
    told = [stopping.add(Token(0, raw[at : at + size])) for at in range(0, len(raw), size)]
    told.append(stopping.end())
    ends = [text.find(s) + len(s) * includes for s in stop if s in text]
    whole = "".join(told)
    assert whole == stopping.whole
    assert stopping.stopped == bool(ends)
    if not ends:
        assert whole == text
    elif len(stop) == 1:
        assert whole == text[: ends[0]]
