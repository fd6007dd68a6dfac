"""`make test-vllm`: the plugin inside `vllm serve`, unmodified, in an environment of its own (`make
setup-vllm`), with SmolLM2 in float32 on a CPU.

Verdicts and answers must be those of the adapter for transformers, whatever the path of a request.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

import helpers
import servers
import tgi_shard
from helpers import CLI, MEAN, chat_message, json_lines, reading

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).with_name("conformance")))
import vllm_driver
from steerbridge import calibration
from steerbridge.package import load
from steerbridge.spec import Reading
from steerbridge.testing import SHAPES, Ground, TinyModel, check_runtime
from steerbridge.testing.cases import standard
from steerbridge_hf import open_model
from steerbridge_run.watchdog import descendants

VLLM = vllm_driver.ENVIRONMENT / "bin" / "vllm"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.is_file(), reason="make setup-vllm"),
]
NEW = 10
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", 8, "--enforce-eager"),
    *("--max-num-batched-tokens", 256, "--block-size", 32, "--served-model-name", "m"),
    *("--gpu-memory-utilization", 0.3),
)


@dataclass
class Case:
    """A model's folder, prompts, a guard, and the answers of the adapter for transformers."""

    model: Path
    prompts: list[Any]
    ids: list[list[int]]
    guard: Path
    texts: list[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory, smollm2_path):
    folder = tmp_path_factory.mktemp("vllm")
    model = open_model(smollm2_path)
    prompts = helpers.corpus_prompts(4)
    readings = [reading("layer_input[18]"), reading("layer_input[8]", MEAN)]
    guard, answers = helpers.fitted(model, prompts, readings, NEW)
    path = guard.save(folder / "guard.gguf")
    texts = [model.tokenizer.decode(a.tokens, skip_special_tokens=True) for a in answers]
    ids = [model.render(prompt) for prompt in prompts]
    return Case(tgi_shard.exported(model, folder / "model"), prompts, ids, path, texts)


@dataclass
class Served:
    """A guarded server, and the events of its workers."""

    url: str
    log: Path
    pid: int

    def post(self, path: str, status: int = 200, **body: Any) -> requests.Response:
        answer = requests.post(self.url + path, json={"model": "m", **body}, timeout=300)
        assert answer.status_code == status, answer.text
        return answer

    def complete(self, ids: list[int], **more: Any) -> Any:
        return self.post("/v1/completions", prompt=ids, **GREEDY, **more).json()

    def events(self, kind: str) -> list[Any]:
        return [e for e in json_lines(self.log.read_text()) if e["event"] == kind]


GREEDY = {"max_tokens": NEW, "temperature": 0}


@contextmanager
def served(case: Case, folder: Path, *before: object, guard: Path | None = None, **settings: str):
    """`steerbridge run -- vllm serve`; words `before` the program's."""
    log = folder / "log.jsonl"
    run = [*CLI, "run", "--package", guard or case.guard, "--log", log, "--"]
    command = [*run, *before, VLLM, "serve", case.model, *OPTIONS]
    environment = {**vllm_driver.SERVED, **settings}
    with servers.running(command, folder / "server.txt", environment=environment) as server:
        yield Served(server.url, log, server.pid)


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    with served(case, tmp_path_factory.mktemp("server")) as one:
        yield one


def test_completions_side_by_side(case, server):
    jobs = [i for i in range(len(case.ids)) for _ in range(3)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: server.complete(case.ids[i]), jobs))
    for i, answer in zip(jobs, answers, strict=True):
        assert answer["choices"][0]["text"].strip() == case.texts[i].strip()
        assert answer["steering"]["fired"] == case.prompts[i].harmful
        assert answer["steering"]["rules"] == (["r"] if case.prompts[i].harmful else [])
        assert "score" not in str(answer["steering"])


def test_a_header_says_it(case, server):
    for i, prompt in enumerate(case.prompts):
        answer = server.post("/v1/completions", prompt=case.ids[i], **GREEDY)
        assert answer.headers["x-steerbridge-fired"] == str(prompt.harmful).lower()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_say_it_at_their_end(case, server, path):
    for i, prompt in enumerate(case.prompts):
        asked = (
            {"prompt": case.ids[i]} if "chat" not in path else {"messages": [chat_message(prompt)]}
        )
        body = {"model": "m", "stream": True, **GREEDY, **asked}
        told = []
        with requests.post(server.url + path, json=body, stream=True, timeout=300) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    told.append(json.loads(line[6:]))
        [said] = [event for event in told if "steering" in event]
        assert said["choices"][0]["finish_reason"]
        assert said["steering"]["fired"] == prompt.harmful
        pieces = [e["choices"][0] for e in told if e["choices"]]
        text = "".join(p.get("text") or p.get("delta", {}).get("content") or "" for p in pieces)
        assert text.strip() == case.texts[i].strip()


def test_chats_and_responses(case, server):
    for i, prompt in enumerate(case.prompts):
        message = chat_message(prompt)
        chat = server.post("/v1/chat/completions", messages=[message], **GREEDY).json()
        assert chat["choices"][0]["message"]["content"].strip() == case.texts[i].strip()
        assert chat["steering"]["fired"] == prompt.harmful
        asked = {"input": prompt.text, "temperature": 0, "max_output_tokens": NEW}
        response = server.post("/v1/responses", **asked).json()
        assert response["steering"]["fired"] == prompt.harmful


def test_several_answers_and_several_prompts(case, server):
    harmful = [prompt.harmful for prompt in case.prompts]
    one = server.post(
        "/v1/completions", prompt=case.ids[0], n=3, max_tokens=4, temperature=1
    ).json()
    assert [a["fired"] for a in one["steering"]["answers"]] == [harmful[0]] * 3
    several = server.post("/v1/completions", prompt=case.ids, **GREEDY).json()
    assert [a["fired"] for a in several["steering"]["answers"]] == harmful
    assert several["steering"]["fired"]


def test_a_request_may_name_the_package_and_no_other(case, server):
    name = load(case.guard).spec.name
    asked = {"prompt": case.ids[0], **GREEDY}
    server.post("/v1/completions", **asked, vllm_xargs={"steerbridge": name})
    told = server.post("/v1/completions", 400, **asked, vllm_xargs={"steerbridge": "none"})
    assert "vllm_xargs.steerbridge" in told.text


def test_a_request_may_ask_for_another_package(case, tmp_path):
    """Side by side, with the same prompts: their cached beginnings are shared."""
    guard = load(case.guard)
    [probe] = guard.spec.probes
    other = guard.replace(name="the others", probes=(probe.replace(comparator="<"),))
    offered = other.save(tmp_path / "other.gguf")
    with served(case, tmp_path, STEERBRIDGE_OFFER=str(offered)) as one:

        def ask(job: tuple[int, bool]) -> Any:
            named = {"vllm_xargs": {"steerbridge": "the others"}} if job[1] else {}
            return one.complete(case.ids[job[0]], **named)["steering"]

        jobs = [(i, named) for i in range(len(case.ids)) for named in (False, True)] * 2
        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(ask, jobs))
        for (i, named), steering in zip(jobs, told, strict=True):
            assert steering["fired"] == (case.prompts[i].harmful != named)
            assert steering["package"] == ("the others" if named else guard.spec.name)
        asked = {"prompt": case.ids[0], **GREEDY, "vllm_xargs": {"steerbridge": "none"}}
        assert "'the others'" in one.post("/v1/completions", 400, **asked).text


def test_verdicts_are_counted_and_logged(case, server):
    before = len(server.events("verdict"))
    for ids in case.ids:
        server.complete(ids)
    fired = [bool(e["fired"]) for e in server.events("verdict")[before:]]
    assert fired == [prompt.harmful for prompt in case.prompts]
    metrics = requests.get(server.url + "/metrics", timeout=60).text
    assert 'steerbridge_verdicts_total{fired="true"}' in metrics
    assert 'steerbridge_rules_fired_total{rule="r"}' in metrics


def test_clients_that_leave(case, server):
    """Requests are given up; those beside them are judged as before."""
    body = {
        "model": "m",
        "stream": True,
        "prompt": case.ids[0],
        "max_tokens": 200,
        "temperature": 0,
    }
    for _ in range(6):
        with requests.post(server.url + "/v1/completions", json=body, stream=True, timeout=60) as r:
            next(r.iter_lines())
    for i, prompt in enumerate(case.prompts):
        assert server.complete(case.ids[i])["steering"]["fired"] == prompt.harmful


# ---------------------------------------------------------------- the engine in a program


def test_the_runtime_answers_and_reads_as_transformers(case, tmp_path, smollm2_path):
    """Generation, capture, rows and calibration; a server takes the thresholds fitted here."""
    hf, rate = open_model(smollm2_path), 0.2
    readings = [reading("layer_input[18]"), reading("layer_input[8]", MEAN)]
    calibrated = tmp_path / "calibrated.gguf"
    rows = vllm_driver.ROOT / "examples" / "smollm2-guard.gguf"
    more = helpers.corpus_prompts(20)
    asked = {
        "model": str(case.model),
        "prompts": [(e.text, e.harmful) for e in case.prompts],
        "readings": readings,
        "guard": str(case.guard),
        "rows": str(rows),
        "new": NEW,
        "more": [(e.text, e.harmful) for e in more],
        "rate": rate,
        "calibrated": str(calibrated),
    }
    told = in_vllm("opened.py", asked, tmp_path)
    states = np.empty((len(case.prompts), len(readings), hf.facts.hidden_size), np.float32)
    hf.capture(case.prompts, [Reading.model_validate(r) for r in readings], states)
    np.testing.assert_allclose(told["states"], states, rtol=1e-3, atol=1e-3)
    guard = load(case.guard)
    for name, package in (("plain", None), ("steered", guard), ("again", None)):
        answers = hf.generate(case.prompts, package, max_new_tokens=NEW)
        want = [[a.text, [*a.tokens], a.finish, a.outcome and a.outcome.fired] for a in answers]
        assert told[name] == want
    for prompt, logits in zip(case.prompts, told["logits"], strict=True):
        for id, found in hf.trace(prompt, load(rows)).logits.items():
            np.testing.assert_allclose(logits[id], found, rtol=1e-3, atol=1e-3)
    fitted = calibration.fit(hf, guard, more, {"*": rate})
    assert told["thresholds"] == pytest.approx(dict(fitted.thresholds), abs=1e-4)
    with served(case, tmp_path, guard=calibrated) as one:
        assert [e["calibrated"] for e in one.events("active")] == [True]


def in_vllm(script: str, asked: Any, folder: Path) -> Any:
    """What a program says in vLLM's environment."""
    files = folder / "asked.json", folder / "answered.json"
    files[0].write_text(json.dumps(asked))
    command = [vllm_driver.PYTHON, Path(__file__).parent / "vllm" / script, *files]
    environment = {**os.environ, **vllm_driver.SETTINGS}
    subprocess.run([*map(str, command)], check=True, env=environment)
    return json.loads(files[1].read_text())


# ---------------------------------------------------------------- several ranks

RANKED = {
    "a batch of prompts that fire and quiet ones, steering a layer",
    "a state that is not a number",
    "intervention: a projection",
    "prompts of two batches and a token, reading a mean",
    "several answers to one prompt",
    "token readings, in a batch, a head",
    "token readings, in a batch, a sentence",
    "token readings, with drafts from n-grams, a head",
}


def test_two_ranks_are_right(tmp_path):
    """Each holds a half of every matrix; they talk over gloo, and rank 0 decides."""
    ground = Ground(tmp_path, head=32)
    driver = vllm_driver.VllmDriver("two ranks", tmp_path / "vllm", ranks=2)
    try:
        found = check_runtime(driver, ground, [s for s in SHAPES if s.name in RANKED])
    finally:
        driver.close()
    assert found.keys() == RANKED
    assert {name: r for name, r in found.items() if r.status != "right"} == {}


# ---------------------------------------------------------------- no answers without the guard


def ended(case: Case, folder: Path, *before: object, **more: Any) -> str:
    """What a server printed that ended before it was ready."""
    with pytest.raises(RuntimeError), served(case, folder, *before, **more):
        pass
    return (folder / "server.txt").read_text()


def test_a_package_of_another_model_ends_the_server(case, tmp_path):
    other = standard(TinyModel())["head"].package.save(tmp_path / "other.gguf")
    assert "ModelMismatch" in ended(case, tmp_path, guard=other)


def test_a_server_without_the_plugin_is_ended(case, tmp_path):
    """Nothing is attached, as where Steerbridge was not installed."""
    empty = tmp_path / "steerbridge_vllm"
    empty.mkdir()
    (empty / "__init__.py").touch()
    (empty / "hook.py").write_text("def install() -> None: ...\n")
    # It may still say that it lives before it is stopped.
    with contextlib.suppress(RuntimeError, requests.ConnectionError):
        with served(case, tmp_path, PYTHONPATH=str(tmp_path)) as one:
            one.complete(case.ids[0])
        raise AssertionError("it answered")
    assert "without the package" in (tmp_path / "server.txt").read_text()


def test_an_emptied_environment_is_filled_again(case, tmp_path):
    with served(case, tmp_path, "env", "-u", "STEERBRIDGE_PACKAGE", "-u", "LD_PRELOAD") as one:
        assert one.complete(case.ids[0])["steering"]["fired"] == case.prompts[0].harmful


def test_a_plugin_that_cannot_be_imported_ends_the_server(case, tmp_path):
    broken = tmp_path / "steerbridge_vllm"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('broken')\n")
    assert "broken" in ended(case, tmp_path, PYTHONPATH=str(tmp_path))


def test_vllm_plugins_has_no_say(case, tmp_path):
    with served(case, tmp_path, VLLM_PLUGINS="none") as one:
        assert one.complete(case.ids[0])["steering"]["fired"] == case.prompts[0].harmful
        names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(one.pid)}
        engines = [pid for pid, name in names.items() if b"EngineCore" in name]
        assert engines, names
        for pid in engines:  # a worker that dies: nobody answers in its place
            os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                body = {"model": "m", "prompt": case.ids[0], **GREEDY}
                answer = requests.post(one.url + "/v1/completions", json=body, timeout=60)
            except requests.ConnectionError:
                break
            assert answer.status_code != 200, answer.text
            time.sleep(0.5)
