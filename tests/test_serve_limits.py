"""Limits of `steerbridge serve`: API key, large bodies, many clients, cancelled requests."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

import helpers
from helpers import reading

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("openai")
import steerbridge_llama_cpp
from helpers import chat_message
from serving import NEW, Served, running

pytestmark = pytest.mark.llama_cpp


@pytest.fixture(scope="module")
def busy(tmp_path_factory, smollm2_f32_path):
    """A server with an API key that queues two requests and accepts small bodies only."""
    folder = tmp_path_factory.mktemp("busy")
    prompts = helpers.corpus_prompts(2)
    model = steerbridge_llama_cpp.open_model(smollm2_f32_path, n_ctx=512)
    guard, answers = helpers.fitted(model, prompts, [reading("layer_input[22]")], NEW)
    model.llama.close()
    path = guard.save(folder / "guard.gguf")
    options = ("--package", path, "--model", smollm2_f32_path, "--context", 512)
    options += ("--waiting", 2, "--max-body-mib", 1, "--raw-prompts")
    with running(folder, *options, STEERBRIDGE_API_KEY="secret") as url:
        yield Served(url, prompts, [], answers)


KEY = {"Authorization": "Bearer secret"}


def test_a_key_is_asked_for(busy):
    assert busy.chat(0).status_code == 401
    assert requests.get(f"{busy.url}/info", timeout=10).status_code == 401
    assert requests.get(f"{busy.url}/health", timeout=10).status_code == 200
    assert requests.get(f"{busy.url}/info", headers=KEY, timeout=10).status_code == 200


def test_large_bodies_are_not_read(busy):
    body = {"inputs": "x" * (2 << 20)}
    answer = requests.post(f"{busy.url}/generate", json=body, headers=KEY, timeout=30)
    assert answer.status_code == 413
    assert "expected 1048576 bytes at most" in answer.json()["error"]


def test_too_many_requests_are_told_so(busy):
    """Every request gets the right answer or status 429."""
    body = {"temperature": 0, "max_tokens": NEW}

    def ask(n):
        i = n % len(busy.prompts)
        answer = requests.post(
            f"{busy.url}/v1/chat/completions",
            json={**body, "messages": [chat_message(busy.prompts[i])]},
            headers=KEY,
            timeout=120,
        )
        return i, answer

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(36)))
    codes = {answer.status_code for _, answer in answers}
    assert codes == {200, 429}
    for i, answer in answers:
        if answer.status_code == 429:
            assert answer.headers["Retry-After"]
            continue
        assert answer.json()["choices"][0]["message"]["content"] == busy.answers[i].text


def test_a_client_that_left_frees_the_model(busy):
    """Covers a dropped stream and a request whose client timed out."""
    long = {"messages": [chat_message(busy.prompts[1])], "max_tokens": 400, "temperature": 1.5}
    url = f"{busy.url}/v1/chat/completions"
    with requests.post(
        url, json={**long, "stream": True}, headers=KEY, stream=True, timeout=30
    ) as stream:
        next(stream.iter_lines())
    with pytest.raises(requests.Timeout):
        requests.post(url, json=long, headers=KEY, timeout=0.5)
    start = time.monotonic()
    body = {"messages": [chat_message(busy.prompts[0])], "max_tokens": 1}
    assert requests.post(url, json=body, headers=KEY, timeout=60).status_code == 200
    text = requests.get(f"{busy.url}/metrics", headers=KEY, timeout=10).text
    cancelled = [line for line in text.splitlines() if 'requests_total{status="cancelled"}' in line]
    assert float(cancelled[0].split()[-1]) >= 1
    assert time.monotonic() - start < 10  # 400 tokens take longer


def test_connections_of_one_address_are_bounded(busy):
    """And one on which nothing comes is closed: `HEAD_SECONDS`."""
    from steerbridge_serve.cli import CONNECTIONS

    port = int(busy.url.rpartition(":")[2])
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS + 20)]
    try:
        refused = 0
        for one in opened[-20:]:
            one.settimeout(2)
            try:
                refused += one.recv(1) == b""
            except ConnectionResetError:
                refused += 1
            except TimeoutError:
                pass
        assert refused >= 20 - 5  # the test's own connections before may still be counted
    finally:
        for one in opened:
            one.close()
    time.sleep(0.5)
    assert requests.get(f"{busy.url}/health", timeout=10).status_code == 200
