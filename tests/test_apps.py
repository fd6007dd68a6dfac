"""`make test-apps`: a package inside unmodified llama.cpp programs.

What fires must answer as the llama-cpp-python adapter does on the same model, what does not as the
program does without us. `python tests/programs.py` sets the programs up.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

import helpers
import programs
from helpers import IMAGE, MEAN, reading

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("llama_cpp", reason="needs the extra `llama-cpp`")

from steerbridge.data import Example
from steerbridge_llama_cpp import open_model

needs_programs = pytest.mark.skipif(programs.built() is None, reason="python tests/programs.py")
pytestmark = [pytest.mark.apps, pytest.mark.llama_cpp]

CLI = [sys.executable, "-m", "steerbridge.cli"]
NEW = 12
END = [reading("layer_input[22]")]
MEANS = [reading("layer_input[18]"), reading("layer_input[8]", MEAN)]
SEEN = [reading("layer_input[18]"), reading("layer_input[8]", IMAGE)]


@dataclass
class Guarded:
    """A model, prompts of both kinds, a guard that tells them apart, and the adapter's answers."""

    model: Path
    mmproj: Path | None
    prompts: list[Example]
    rendered: list[list[int]]
    guard: Path
    steered: list[Any] = field(default_factory=list)

    @property
    def options(self) -> list[str]:
        """For a program: the model, and attention computed as llama-cpp-python does."""
        vision = ["--mmproj", str(self.mmproj)] if self.mmproj else []
        return ["-m", str(self.model), *vision, "-fa", "off"]


def guarded(folder, model, prompts, readings, mmproj=None) -> Guarded:
    """A guard fitted to these very prompts, and the adapter's answers."""
    opened = open_model(model, mmproj=mmproj, n_ctx=1024, n_threads=2)
    package, answers = helpers.fitted(opened, prompts, readings, NEW)
    path = package.save(folder / "guard.gguf")
    rendered = [opened.render(p) for p in prompts]
    opened.llama.close()
    return Guarded(Path(model), mmproj, prompts, rendered, path, answers)


# In F32 rows do not depend on what else is in their batch: programs cut prompts as they like.
@pytest.fixture(scope="module")
def text(tmp_path_factory, smollm2_f32_path):
    return guarded(tmp_path_factory.mktemp("text"), smollm2_f32_path, helpers.corpus_prompts(), END)


@pytest.fixture(scope="module")
def means(tmp_path_factory, smollm2_f32_path):
    return guarded(
        tmp_path_factory.mktemp("means"), smollm2_f32_path, helpers.corpus_prompts(), MEANS
    )


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, smollm2_path):
    return guarded(
        tmp_path_factory.mktemp("quantised"), smollm2_path, helpers.corpus_prompts(), END
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, demo_files):
    from steerbridge_demo.guard import guard_examples

    folder = tmp_path_factory.mktemp("pictures")
    prompts = guard_examples(folder, "test", per_kind=3, kinds=("image", "both"))
    return guarded(folder, demo_files["text_f32"], prompts, SEEN, demo_files["mmproj_f32"])


# ---------------------------------------------------------------- a server


@dataclass
class Server:
    """A running llama-server, and what its preload has told."""

    url: str
    log: Path
    warm: int = 0  # verdicts on what llama-server runs before it is ready

    def post(self, path, **body) -> Any:
        answer = requests.post(self.url + path, json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def complete(self, tokens, **options) -> Any:
        """Greedy tokens after a prompt of tokens."""
        return self.post("/completion", prompt=tokens, **greedy(options))

    def chat(self, prompt: Example) -> str:
        body = {"messages": [message(prompt)], "temperature": 0, "max_tokens": NEW}
        found = self.post("/v1/chat/completions", **body)
        return found["choices"][0]["message"]["content"]

    def events(self, kind="verdict", count=0) -> list[Any]:
        """Events of a kind, once there are so many; verdicts on requests alone."""
        skipped = self.warm if kind == "verdict" else 0
        until = time.monotonic() + 10
        while True:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            found = [e for e in map(json.loads, lines) if e["event"] == kind][skipped:]
            if len(found) >= count or time.monotonic() > until:
                return found
            time.sleep(0.02)

    def fired(self, count) -> list[bool]:
        found = self.events(count=count)
        assert len(found) == count
        return [bool(e["fired"]) for e in found]


def greedy(options) -> dict[str, Any]:
    return {"temperature": 0, "n_predict": NEW, "return_tokens": True, **options}


def message(prompt: Example) -> dict[str, Any]:
    urls = [
        "data:image/png;base64," + base64.b64encode(p.read_bytes()).decode() for p in prompt.images
    ]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*shown, {"type": "text", "text": prompt.text}] if shown else prompt.text
    return {"role": "user", "content": content}


@contextlib.contextmanager
def served(case: Guarded, *options, steer=True):
    """llama-server with the model of a case, steered or as it is."""
    name = f"server{len(list(case.guard.parent.iterdir()))}"
    log = case.guard.with_name(f"{name}.jsonl")
    prefix = [*CLI, "run", "--package", str(case.guard), "--log", str(log), "--"]
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
def test_chats_of_llama_server(case, request):
    """One at a time: what does not fire equals the server without us to the letter.

    A quantised model computes batches of other sizes with other roundings, steered or not: the
    server cuts prompts elsewhere than the adapter, so what fires is only compared with the server.
    """
    name, case = case, request.getfixturevalue(case)
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


@needs_programs
def test_slots_side_by_side(means):
    """Batches of several slots, some of which fire; answers streamed, cancelled, repeated."""
    jobs = [i for i in range(len(means.prompts)) for _ in range(2)]
    random.Random(0).shuffle(jobs)
    with served(means, "-np", "4") as server:

        def ask(i):
            return i, server.complete(means.rendered[i])["tokens"]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(ask, jobs))
        fired = server.fired(len(jobs))
        assert sum(fired) == sum(means.prompts[i].harmful for i in jobs)
    for i, tokens in found:
        assert tuple(tokens) == means.steered[i].tokens


@needs_programs
def test_streams_and_cancelled_requests(means):
    with served(means, "-np", "1") as server:
        for i, prompt in enumerate(means.prompts[:4]):
            body = greedy({"prompt": means.rendered[i], "stream": True, "n_predict": 400})
            body |= {"ignore_eos": True}
            url = server.url + "/completion"
            with requests.post(url, json=body, stream=True, timeout=120) as stream:
                lines = (line for line in stream.iter_lines() if line.startswith(b"data: "))
                tokens = [json.loads(next(lines)[6:])["tokens"][0] for _ in range(4)]
            # Gone after four tokens: the next one on the slot is judged afresh.
            assert tuple(tokens) == means.steered[i].tokens[:4]
            assert server.fired(i + 1)[-1] == prompt.harmful


@needs_programs
def test_cached_prefixes_and_further_turns(means):
    """The same prompt again, of which all but one row is cached, and a turn after it."""
    with served(means, "-np", "1") as server:
        seen = []
        for i in (0, 0, 1, 1):
            again = server.complete(means.rendered[i])
            assert tuple(again["tokens"]) == means.steered[i].tokens
            seen.append(means.prompts[i].harmful)
            assert server.fired(len(seen)) == seen
        assert again["timings"]["cache_n"] > 5
        chat = [message(means.prompts[1]), {"role": "assistant", "content": "Gladly."}]
        turns = [*chat, message(means.prompts[3])]
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


@needs_programs
def test_several_answers_of_one_prompt(means):
    """`n_cmpl`: the prompt is evaluated once and its sequence copied."""
    with served(means, "-np", "3") as server:
        for i in (0, 1):
            body = greedy({"prompt": means.rendered[i], "n_cmpl": 3})
            found = server.post("/completion", **body)
            assert [tuple(f["tokens"]) for f in found] == [means.steered[i].tokens] * 3


@needs_programs
def test_saved_slots(text, tmp_path):
    """A slot restored from a file: what was judged before is judged again, as it was."""
    options = ("-np", "1", "--slot-save-path", str(tmp_path))
    with served(text, *options) as server:
        for i in (0, 1):
            first = server.complete(text.rendered[i])["tokens"]
            server.post("/slots/0?action=save", filename="slot.bin")
            server.complete(text.rendered[3 - i])
            server.post("/slots/0?action=restore", filename="slot.bin")
            again = server.complete(text.rendered[i])["tokens"]
            assert tuple(first) == text.steered[i].tokens
            assert again == first
        assert server.fired(6) == [True, False, True, False, True, False]


@needs_programs
def test_a_context_that_shifts(text):
    """Rows thrown away in the middle of an answer are no new prompt."""
    long = "Tell me a long story about a ship. " * 8
    with served(text, "-np", "1", "-c", "256", "--context-shift") as server:
        found = server.post(
            "/completion", prompt=long, **greedy({"n_predict": 300, "ignore_eos": True})
        )
        assert found["truncated"]
        assert len(server.events(count=1)) == 1
        assert server.events("refused") == []
        answer = server.complete(text.rendered[0])["tokens"]
        assert tuple(answer) == text.steered[0].tokens


@needs_programs
@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_speculation(means, smollm2_path, kind):
    """Drafted tokens are verified in one batch, every row of it steered."""
    options = {
        "draft": ("-md", str(smollm2_path), "--spec-type", "draft-simple"),
        "ngram": ("--spec-type", "ngram-simple"),
    }[kind]
    with served(means, "-np", "2", *options) as server:
        for i in range(4):
            answer = server.complete(means.rendered[i])
            assert tuple(answer["tokens"]) == means.steered[i].tokens
            if kind == "draft":
                assert answer["timings"]["draft_n"] > 0
        told = server.events(count=4)
        main = [e for e in told if e["context"] == told[0]["context"]]
        assert [bool(e["fired"]) for e in main] == [p.harmful for p in means.prompts[:4]]


@needs_programs
def test_a_cache_a_sequence_is_refused_at_start(text):
    """Where rows of several sequences do not stay in order."""
    command = [
        *CLI,
        *("run", "--package", str(text.guard), "--", str(programs.built() / "llama-server")),
        *(*text.options, "-np", "2", "--no-kv-unified", "--port", "0"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 78
    assert "KV cache: expected a unified one" in done.stderr


# ---------------------------------------------------------------- programs of one prompt


def ran(case: Guarded, command, steer=True, environment=None):
    """Standard output, and the verdicts if steered."""
    log = case.guard.with_suffix(".once.jsonl")
    log.unlink(missing_ok=True)
    prefix = [*CLI, "run", "--package", str(case.guard), "--log", str(log), "--"]
    done = subprocess.run(
        [*(prefix if steer else []), *command],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in log.read_text().splitlines()] if steer else []
    return done.stdout, [bool(e["fired"]) for e in events if e["event"] == "verdict"]


@needs_programs
@pytest.mark.parametrize("i", [0, 1])
def test_llama_cli(text, i):
    command = [
        *(str(programs.built() / "llama-cli"), *text.options, "-st", "-t", "2", "-c", "1024"),
        *("--temp", "0", "-n", str(NEW), "--no-display-prompt", "-p", text.prompts[i].text),
    ]
    plain, _ = ran(text, command, steer=False)
    got, fired = ran(text, command)
    assert fired[-1] == text.prompts[i].harmful  # the first ones are of its warm-up
    assert text.steered[i].text.strip() in got
    if not text.prompts[i].harmful:
        assert answer_of(got) == answer_of(plain)


def answer_of(output: str) -> str:
    """Without the lines that tell of time: a turning wheel, and speeds."""
    kept = [s for s in output.splitlines() if " t/s" not in s and "Loading model" not in s]
    return "\n".join(kept)


@needs_programs
@pytest.mark.parametrize("i", [0, 1])
def test_llama_mtmd_cli(pictures, i):
    prompt = pictures.prompts[i]
    command = [
        *(str(programs.built() / "llama-mtmd-cli"), *pictures.options, "--jinja", "-t", "2"),
        *("--image", str(prompt.images[0]), "-p", prompt.text, "-c", "1024", "--temp", "0"),
        *("-n", str(NEW)),
    ]
    plain, _ = ran(pictures, command, steer=False)
    got, fired = ran(pictures, command)
    assert fired[-1] == prompt.harmful
    assert got.strip() == (pictures.steered[i].text if prompt.harmful else plain).strip()


NODE = """
import {getLlama} from "node-llama-cpp";
const [path, ...prompts] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({
    contextSize: 1024, threads: 2, flashAttention: false
});
const sequence = context.getSequence();
for (const prompt of prompts) {
    await sequence.clearHistory();
    const tokens = [];
    for await (const token of sequence.evaluate(JSON.parse(prompt), {temperature: 0})) {
        tokens.push(token);
        if (tokens.length === NEW) break;
    }
    console.log(JSON.stringify(tokens));
}
await llama.dispose();
"""


@pytest.mark.parametrize("release", programs.NODE_LLAMA_CPP)
def test_node_llama_cpp(means, release):
    """Prebuilt libraries of other versions of llama.cpp than that of llama-cpp-python."""
    if (folder := programs.node(release)) is None:
        pytest.skip("python tests/programs.py, and npm")
    path = folder / "app.mjs"
    path.write_text(NODE.replace("NEW", str(NEW)))
    command = [shutil.which("node"), str(path), str(means.model), *map(str, means.rendered)]
    plain, _ = ran(means, command, steer=False)
    got, fired = ran(means, command)
    assert fired == [p.harmful for p in means.prompts]
    answers = [[tuple(json.loads(line)) for line in out.splitlines()] for out in (got, plain)]
    for i, (steered, unsteered) in enumerate(zip(*answers, strict=True)):
        assert steered == (means.steered[i].tokens if means.prompts[i].harmful else unsteered)
