"""`make test-apps`: a package inside an unmodified llama-server.

If a prompt fires, the answer must equal that of the llama-cpp-python adapter on the same model;
otherwise it must equal the unsteered server's. `python tests/programs.py` sets the programs up.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

import programs
import sliding_model

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("llama_cpp", reason="needs the extra `llama-cpp`")
from guarded import NEW, Guarded
from helpers import CLI, MEAN, chat_message, reading
from steerbridge.data import Example
from steerbridge.package import load
from test_run import package

pytestmark = [pytest.mark.apps, pytest.mark.llama_cpp]


SERVER = f"llama-server, {programs.llama_cpp()}"
needs_programs = pytest.mark.skipif(programs.built() is None, reason="python tests/programs.py")


@dataclass
class Server:
    """A running llama-server and the events of its preload."""

    url: str
    log: Path
    warm: int = 0  # verdicts on what llama-server runs before it is ready

    def post(self, path, **body) -> Any:
        answer = requests.post(self.url + path, json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def complete(self, tokens, **options) -> Any:
        """A greedy completion of a prompt given as tokens."""
        return self.post("/completion", prompt=tokens, **greedy(options))

    def chat(self, prompt: Example) -> str:
        body = {"messages": [chat_message(prompt)], "temperature": 0, "max_tokens": NEW}
        completion = self.post("/v1/chat/completions", **body)
        return completion["choices"][0]["message"]["content"]

    def events(self, kind="verdict", count=0) -> list[Any]:
        """Events of one kind, once there are `count`; verdicts of the warm-up are left out."""
        skipped = self.warm if kind == "verdict" else 0
        until = time.monotonic() + 10
        while True:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            matching = [e for e in map(json.loads, lines) if e["event"] == kind][skipped:]
            if len(matching) >= count or time.monotonic() > until:
                return matching
            time.sleep(0.02)

    def fired(self, count) -> list[bool]:
        verdicts = self.events(count=count)
        assert len(verdicts) == count
        return [bool(e["fired"]) for e in verdicts]


def greedy(options) -> dict[str, Any]:
    return {"temperature": 0, "n_predict": NEW, "return_tokens": True, **options}


@contextlib.contextmanager
def served(case: Guarded, *options, steer=True):
    """llama-server with the model of a case, steered or plain."""
    name = f"server{len(list(case.guard.parent.iterdir()))}"
    log = case.guard.with_name(f"{name}.jsonl")
    prefix = case.steer(log)
    with programs.llama_server(
        [*case.options, "-t", 2, "-c", 4096, "--no-webui", *options],
        case.guard.with_name(f"{name}.txt"),
        prefix if steer else (),
    ) as url:
        server = Server(url, log)
        server.warm = len(server.events())
        yield server


@needs_programs
@pytest.mark.parametrize("case", ["text", "means", "pictures", "quantised"])
def test_chats_of_llama_server(case, request, tried):
    """One request at a time: answers to prompts that do not fire equal the plain server's.

    A quantised model rounds differently for other batch sizes, and the server splits prompts
    differently from the adapter, so its steered answers are only compared with the plain server's.
    """
    name, case = case, request.getfixturevalue(f"guarded_{case}")
    with served(case, "-np", "2", steer=False) as server:
        plain = [server.chat(p) for p in case.prompts]
    with served(case, "-np", "2") as server:
        got = [server.chat(p) for p in case.prompts]
        assert server.fired(len(got)) == [p.harmful for p in case.prompts]
        assert len(server.events("active")) == 1
    for prompt, text, unsteered, wanted in zip(case.prompts, got, plain, case.steered, strict=True):
        if prompt.harmful and name == "quantised":
            assert text != unsteered
        else:
            assert text == (wanted.text if prompt.harmful else unsteered)
    tried(SERVER, f"chats, {name}")


@needs_programs
@pytest.mark.parametrize("cache", ["--kv-unified", "--no-kv-unified"])
def test_slots_side_by_side(guarded_means, tried, cache):
    """Batches over several slots, some of which fire.

    With a cache each, llama.cpp takes their rows in another order.
    """
    jobs = [i for i in range(len(guarded_means.prompts)) for _ in range(2)]
    random.Random(0).shuffle(jobs)
    with served(guarded_means, "-np", "4", cache) as server:

        def ask(i):
            return i, server.complete(guarded_means.rendered[i])["tokens"]

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(ask, jobs))
        fired = server.fired(len(jobs))
        assert sum(fired) == sum(guarded_means.prompts[i].harmful for i in jobs)
    for i, tokens in results:
        assert tuple(tokens) == guarded_means.steered[i].tokens
    tried(SERVER, f"slots side by side, {cache[2:]}")


@needs_programs
def test_streams_and_cancelled_requests(guarded_means, tried):
    with served(guarded_means, "-np", "1") as server:
        for i, prompt in enumerate(guarded_means.prompts[:4]):
            body = greedy({"prompt": guarded_means.rendered[i], "stream": True, "n_predict": 400})
            body |= {"ignore_eos": True}
            url = server.url + "/completion"
            with requests.post(url, json=body, stream=True, timeout=120) as stream:
                lines = (line for line in stream.iter_lines() if line.startswith(b"data: "))
                tokens = [json.loads(next(lines)[6:])["tokens"][0] for _ in range(4)]
            # Gone after four tokens: the next one on the slot is judged afresh.
            assert tuple(tokens) == guarded_means.steered[i].tokens[:4]
            assert server.fired(i + 1)[-1] == prompt.harmful
    tried(SERVER, "streams and cancelled requests")


@needs_programs
def test_cached_prefixes_and_further_turns(guarded_means, tried):
    """A repeated prompt with all but one row cached, and a following turn."""
    with served(guarded_means, "-np", "1") as server:
        seen = []
        for i in (0, 0, 1, 1):
            again = server.complete(guarded_means.rendered[i])
            assert tuple(again["tokens"]) == guarded_means.steered[i].tokens
            seen.append(guarded_means.prompts[i].harmful)
            assert server.fired(len(seen)) == seen
        assert again["timings"]["cache_n"] > 5
        chat = [chat_message(guarded_means.prompts[1]), {"role": "assistant", "content": "Gladly."}]
        turns = [*chat, chat_message(guarded_means.prompts[3])]
        first = server.post("/v1/chat/completions", messages=turns, temperature=0, max_tokens=4)
        fresh = server.post(
            "/v1/chat/completions",
            messages=turns,
            temperature=0,
            max_tokens=4,
            cache_prompt=False,
        )
        assert first["choices"] == fresh["choices"]
        scores = [e["probes"][0]["score"] for e in server.events(count=6)[-2:]]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-4)
    tried(SERVER, "cached prefixes")
    tried(SERVER, "further turns")


@needs_programs
def test_several_answers_of_one_prompt(guarded_means, tried):
    """`n_cmpl`: the prompt is evaluated once and its sequence is copied."""
    with served(guarded_means, "-np", "3") as server:
        for i in (0, 1):
            body = greedy({"prompt": guarded_means.rendered[i], "n_cmpl": 3})
            completions = server.post("/completion", **body)
            assert [tuple(f["tokens"]) for f in completions] == [
                guarded_means.steered[i].tokens
            ] * 3
    tried(SERVER, "n_cmpl")


@needs_programs
def test_saved_slots(guarded_means, tried, tmp_path):
    """A prompt in a slot restored from a file is probed again, with the same verdict; also by a
    server that was started later."""
    options = ("-np", "1", "--slot-save-path", str(tmp_path))
    with served(guarded_means, *options) as server:
        for i in (0, 1):
            first = server.complete(guarded_means.rendered[i])["tokens"]
            server.post("/slots/0?action=save", filename=f"{i}.bin")
            server.complete(guarded_means.rendered[3 - i])
            server.post("/slots/0?action=restore", filename=f"{i}.bin")
            again = server.complete(guarded_means.rendered[i])["tokens"]
            assert tuple(first) == guarded_means.steered[i].tokens
            assert again == first
        assert server.fired(6) == [True, False, True, False, True, False]
    with served(guarded_means, *options) as server:
        for i in (0, 1):
            server.post("/slots/0?action=restore", filename=f"{i}.bin")
            again = server.complete(guarded_means.rendered[i])
            assert again["timings"]["cache_n"] > 5
            assert tuple(again["tokens"]) == guarded_means.steered[i].tokens
        assert server.fired(2) == [True, False]
    tried(SERVER, "saved slots")
    tried(SERVER, "saved slots, started again")


@needs_programs
def test_the_store_of_prompts(guarded_means, tried):
    """Prompts that left a slot come back from memory with what means need of their rows."""
    with served(guarded_means, "-np", "1", "--cache-ram", "512") as server:
        for i in (0, 1, 2, 3, 0, 1, 2, 3):
            answer = server.complete(guarded_means.rendered[i])
            assert tuple(answer["tokens"]) == guarded_means.steered[i].tokens
        assert answer["timings"]["cache_n"] > 5
        wanted = [prompt.harmful for prompt in guarded_means.prompts[:4]]
        assert server.fired(8) == [*wanted, *wanted]
        assert not any("unjudged" in event["probes"][0] for event in server.events())
    tried(SERVER, "store of prompts")


@needs_programs
def test_a_context_that_shifts(guarded_text, tried):
    """Discarding rows in the middle of an answer does not start a new request."""
    long = "Tell me a long story about a ship. " * 8
    with served(guarded_text, "-np", "1", "-c", "256", "--context-shift") as server:
        completion = server.post(
            "/completion", prompt=long, **greedy({"n_predict": 300, "ignore_eos": True})
        )
        assert completion["truncated"]
        assert len(server.events(count=1)) == 1
        assert server.events("refused") == []
        answer = server.complete(guarded_text.rendered[0])["tokens"]
        assert tuple(answer) == guarded_text.steered[0].tokens
    tried(SERVER, "context shift")


@needs_programs
@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_speculation(guarded_means, tried, smollm2_path, kind):
    """Drafted tokens are verified in one batch; every row of it is steered."""
    options = {
        "draft": ("-md", str(smollm2_path), "--spec-type", "draft-simple"),
        "ngram": ("--spec-type", "ngram-simple"),
    }[kind]
    with served(guarded_means, "-np", "2", *options) as server:
        for i in range(4):
            answer = server.complete(guarded_means.rendered[i])
            assert tuple(answer["tokens"]) == guarded_means.steered[i].tokens
            if kind == "draft":
                assert answer["timings"]["draft_n"] > 0
        told = server.events(count=4)
        main = [e for e in told if e["context"] == told[0]["context"]]
        assert [bool(e["fired"]) for e in main] == [p.harmful for p in guarded_means.prompts[:4]]
    tried(SERVER, {"draft": "a draft model", "ngram": "n-gram drafts"}[kind])


@needs_programs
def test_checkpoints_of_a_sliding_window(tried, tmp_path):
    """Rows that have slid out come back from a checkpoint; what a mean needs of them was kept."""
    model = sliding_model.save(tmp_path / "sliding.gguf")
    guard = package(model, 1e9, tmp_path, [reading("layer_input[4]", MEAN)])
    draw, log = random.Random(5), tmp_path / "log.jsonl"
    long, other = ([draw.randrange(97, 123) for _ in range(size)] for size in (400, 30))
    options = ["-m", model, "-t", 2, "-c", 1024, "-np", 1, "-b", 32, "-ub", 32, "--no-webui"]
    options += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    before = [*CLI, "run", "--package", str(guard), "--log", str(log), "--"]
    with programs.llama_server(options, tmp_path / "server.txt", before) as url:
        server = Server(url, log)
        for prompt in (long[:60], long):
            server.complete(prompt, n_predict=4)
        back = server.complete([*long[:58], *other], n_predict=4)
        assert back["timings"]["cache_n"] > 50
        fresh = server.complete([*long[:58], *other], n_predict=4, cache_prompt=False)
        assert back["tokens"] == fresh["tokens"]
        told = [event["probes"][0]["score"] for event in server.events(count=4)]
    assert told[2] == pytest.approx(told[3], rel=1e-3)
    tried(SERVER, "checkpoints of a sliding window")


@needs_programs
def test_chunks_of_the_cache_that_move(tried, tmp_path, smollm2_path):
    """`--cache-reuse` moves two chunks up: a mean is over their rows, not over those between.

    The probe is linear, so the sums of longer and longer prompts give the share of each chunk.
    """
    guard = package(smollm2_path, 1e9, tmp_path, [reading("layer_input[22]", MEAN)])
    bias = load(guard).spec.probes[0].bias
    log, size, draw = tmp_path / "log.jsonl", 64, random.Random(3)
    chunks = [[draw.randrange(1000, 9000) for _ in range(size)] for _ in range(5)]
    options = ["-m", smollm2_path, "-t", 2, "-c", 1024, "-np", 1, "--no-webui"]
    options += ["--cache-reuse", 16]
    before = [*CLI, "run", "--package", str(guard), "--log", str(log), "--"]
    with programs.llama_server(options, tmp_path / "server.txt", before) as url:
        server = Server(url, log)
        for count in range(1, 6):
            server.complete([token for chunk in chunks[:count] for token in chunk], n_predict=1)
        moved = server.complete([*chunks[0], *chunks[2], *chunks[4]], n_predict=1)
        assert moved["timings"]["cache_n"] > 2.5 * size
        *longer, told = [event["probes"][0]["score"] - bias for event in server.events(count=6)]
    sums = [score * size * count for count, score in enumerate(longer, 1)]
    shares = [after - before for before, after in zip([0, *sums], sums, strict=False)]
    expected = (shares[0] + shares[2] + shares[4]) / (3 * size)
    others = (shares[0] + shares[1] + shares[2]) / (3 * size)
    assert told == pytest.approx(expected, abs=abs(expected - others) / 5)
    tried(SERVER, "--cache-reuse")
