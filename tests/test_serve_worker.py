"""Parts of `steerbridge serve` without HTTP: the life of a job, and stop sequences."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerbridge.serving import Cancelled, Ended, Prompt, Question, Sampling, Token
from steerbridge_serve.text import Text
from steerbridge_serve.worker import Finish, Job, State, Step, Worker


class Slow:
    """An engine that produces a token, or checks, only when the test releases it."""

    name, context, vision = "slow", 100, False

    def __init__(self):
        self.go = threading.Semaphore(0)
        self.begun = []

    def prompt(self, question):
        return Prompt(question.prompt, ())

    def answer(self, question, sampling, emit, check):
        self.begun.append(question.prompt)
        if question.prompt == "bad":
            raise RuntimeError("no")
        for n in range(sampling.max_new_tokens or 100):
            self.go.acquire()
            check()
            if not emit(Token(n, b"x"), None):
                return Ended("stopped", 1, None)
        return Ended("length", 1, None)


def job(prompt, new=2, stop=()):
    return Job(lambda: Question(prompt=prompt), Sampling(new), Text(stop, includes=False))


async def events(one):
    """All events of a job, an error as the last."""
    seen = []
    while not seen or not isinstance(seen[-1], Finish | Exception):
        try:
            seen.append(await asyncio.wait_for(one.event(), 5))
        except Exception as error:
            seen.append(error)
    return seen


def test_a_loop_that_waits_for_the_whole_is_woken_once():
    """A third thread between the two that compute would cost time at every token."""
    engine = Slow()
    worker = Worker(engine, hold_back=0)

    async def run():
        loop, woken = asyncio.get_running_loop(), []
        real = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *a: (woken.append(a), real(*a))[1]
        whole, streamed = job("a", new=5), job("b", new=3)
        worker.submit(whole)
        engine.go.release(5)
        await asyncio.wait_for(whole.ended(), 5)
        assert len(woken) == 1
        assert len(await events(whole)) == 6
        worker.submit(streamed)
        for _ in range(3):
            engine.go.release()
            assert isinstance(await asyncio.wait_for(streamed.event(), 5), Step)
        assert isinstance(await asyncio.wait_for(streamed.event(), 5), Finish)

    asyncio.run(run())
    worker.close()


async def begun(engine, count=1):
    while len(engine.begun) < count:
        await asyncio.sleep(0.01)


def test_a_cancelled_job_leaves_the_queue_at_once_and_is_never_begun():
    engine = Slow()
    worker = Worker(engine, hold_back=0)

    async def run():
        jobs = [job(str(n)) for n in range(3)]
        for one in jobs:
            worker.submit(one)
        await begun(engine)
        assert worker.waiting == 2
        worker.cancel(jobs[1])
        assert worker.waiting == 1
        assert [type(e) for e in await events(jobs[1])] == [Cancelled]
        engine.go.release(4)
        whole = [[type(e).__name__ for e in await events(j)] for j in (jobs[0], jobs[2])]
        assert whole == [["Step", "Step", "Finish"]] * 2
        assert [j.state for j in jobs] == [State.ENDED, State.CANCELLED, State.ENDED]

    asyncio.run(run())
    worker.close()
    assert engine.begun == ["0", "2"]


def test_a_running_job_ends_at_its_next_check_and_says_so():
    engine = Slow()
    worker = Worker(engine, hold_back=0)

    async def run():
        one = job("x", 50)
        worker.submit(one)
        await begun(engine)
        worker.cancel(one)
        engine.go.release()
        assert [type(e) for e in await events(one)] == [Cancelled]

    asyncio.run(run())
    worker.close()


@pytest.mark.parametrize("queued", [0, 3])
def test_closing_ends_every_job_with_an_event(queued):
    engine = Slow()
    worker = Worker(engine, hold_back=0)

    async def run():
        jobs = [job(str(n), 50) for n in range(1 + queued)]
        for one in jobs:
            worker.submit(one)
        await begun(engine)
        start = time.monotonic()
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        await asyncio.sleep(0.05)
        engine.go.release()
        await closing
        assert time.monotonic() - start < 10
        for one in jobs:
            assert isinstance((await events(one))[-1], Cancelled)
        late = job("late")
        worker.submit(late)
        assert isinstance((await events(late))[-1], Cancelled)

    asyncio.run(run())
    assert not worker.alive


def test_an_engine_that_fails_fails_one_request():
    engine = Slow()
    worker = Worker(engine, hold_back=0)

    async def run():
        bad, good = job("bad"), job("good")
        worker.submit(bad)
        worker.submit(good)
        engine.go.release(2)
        assert str((await events(bad))[-1]) == "no"
        assert isinstance((await events(good))[-1], Finish)

    asyncio.run(run())
    assert worker.alive
    worker.close()


def test_stops_are_found_where_the_tokens_are():
    """The finish and the counts cannot race with the client: no token follows the stop."""
    engine = Slow()
    worker = Worker(engine, hold_back=0)

    async def run():
        one = job("x", 50, ("xxx",))
        worker.submit(one)
        engine.go.release(50)
        *steps, finish = await events(one)
        assert (finish.reason, finish.tokens, len(steps)) == ("stop_sequence", 3, 3)
        assert "".join(step.text for step in steps) + finish.text == ""

    asyncio.run(run())
    worker.close()


def test_tokens_of_a_prompt_wait_their_turn():
    engine = Slow()
    worker = Worker(engine, hold_back=0)

    async def run():
        asked = Job(lambda: Question(prompt="abc"), None)
        worker.submit(asked)
        assert await asked.event() == Prompt("abc", ())

    asyncio.run(run())
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
