"""llama-cpp-python's server with a package, tested through the official OpenAI client."""

from __future__ import annotations

import subprocess
import sys

import pytest

import helpers
import servers

pytest.importorskip("llama_cpp")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from steerbridge_llama_cpp import open_model  # noqa: E402

pytestmark = pytest.mark.llama_cpp

CHAT = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def client(smollm2_path, tmp_path_factory):
    """A client of a local server whose probe fires on every prompt."""
    folder = tmp_path_factory.mktemp("server")
    known = open_model(smollm2_path, n_ctx=64).facts
    probe = helpers.linear_probe(readings=[helpers.reading("layer_input[22]")], threshold=-1e9)
    package = helpers.package(known, scale=0.05, probes=[probe]).save(folder / "guard.gguf")
    command = [sys.executable, "-m", "steerbridge_llama_cpp.server", "--package", package]
    command += ["--model", smollm2_path, "--n_ctx", "256", "--verbose", "false"]
    with servers.running(command, folder / "log", ready="/v1/models") as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def steering(answer):
    return (answer.model_extra or {}).get("steering")


def test_answers_say_what_was_decided(client):
    chat = client.chat.completions.create(model="m", messages=CHAT, max_tokens=4, temperature=0)
    assert chat.choices[0].message.content
    assert steering(chat)["fired"]
    assert steering(chat)["rules"] == ["r"]
    text = client.completions.create(model="m", prompt="The sea is", max_tokens=4, temperature=0)
    assert text.choices[0].text
    assert steering(text)["verdicts"][0]["threshold"] == -1e9


def test_streams_say_it_in_every_chunk(client):
    options = {"model": "m", "max_tokens": 4, "temperature": 0, "stream": True}
    chunks = list(client.chat.completions.create(messages=CHAT, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks)
    assert all(steering(c)["fired"] for c in chunks)
    assert all(steering(c)["fired"] for c in client.completions.create(prompt="So", **options))


def test_a_missing_package_ends_the_command_before_it_listens(smollm2_path):
    command = [sys.executable, "-m", "steerbridge_llama_cpp.server", "--package", "/nowhere"]
    got = subprocess.run([*command, "--model", str(smollm2_path)], capture_output=True, text=True)
    assert got.returncode == 1
    assert "no steering package at /nowhere" in got.stderr
