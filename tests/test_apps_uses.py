"""`make test-apps`: programs that nobody here wrote, each shape of their use, on the kit's model.

The guard reads the prompt's end and a mean, edits logits and steers a block. Verdicts and tokens
are compared with the oracle; where a program limits its tokens, with the program unsteered.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import programs
import sliding_model

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("llama_cpp", reason="needs the extra `llama-cpp`")
from helpers import CLI, json_lines
from steerbridge.testing.cases import Case, standard
from steerbridge.testing.model import EOS, TEMPLATE, TinyModel
from steerbridge.testing.oracle import Expected, answer
from test_apps_server import Server

pytestmark = [pytest.mark.apps, pytest.mark.llama_cpp]
needs_programs = pytest.mark.skipif(programs.built() is None, reason="python tests/programs.py")

NEW = 8  # tokens of an answer
USER, ASSISTANT = 257, 258
HERE = Path(__file__).parent / "apps"
BUILT = programs.llama_cpp()
SCRIPT = f"llama-cpp-python {programs.llama_version()}"


@dataclass
class Tiny:
    """The kit's model, a guard, a prompt that fires and one that does not."""

    folder: Path
    case: Case
    model: Path
    guard: Path
    prompts: list[str]

    def expected(self, ids: Sequence[int], new: int = NEW) -> Expected:
        return answer(self.case.model, self.case.package, list(ids), new)

    def ids(self, prompt: str) -> list[int]:
        return self.case.model.encode(prompt)

    def text(self, prompt: str) -> str:
        """The right answer."""
        return bytes(self.expected(self.ids(prompt)).tokens).decode()

    def chat(self, prompt: str) -> list[int]:
        """Tokens of a chat of one message."""
        return [USER, *self.ids(prompt), EOS, ASSISTANT]

    def run(
        self, command: Sequence[object], steer: bool = True, check: bool = True
    ) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
        """A program, and the events that were told."""
        log = self.folder / "log.jsonl"
        log.unlink(missing_ok=True)
        run = [*CLI, "run", "--package", str(self.guard), "--log", str(log), "--"]
        done = subprocess.run(
            [*(run if steer else []), *map(str, command)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=120,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done, json_lines(log.read_text()) if log.exists() else []

    def told(self, events: Sequence[Any], prompts: Sequence[Sequence[int]]) -> bool:
        """Whether a context was told these verdicts, those of the prompts, and no others."""
        wanted = [self.expected(ids, 1).outcome for ids in prompts]
        verdicts = [event for event in events if event["event"] == "verdict"]
        verdicts.sort(key=lambda event: event["context"])
        for _, group in groupby(verdicts, key=lambda event: event["context"]):
            found = list(group)
            if len(found) == len(wanted) and all(map(_same, found, wanted)):
                return True
        return False


def _same(event: Any, outcome: Any) -> bool:
    """Programs may keep their cache as F16, so scores may differ by what that rounds."""
    [verdict], [probe] = outcome.verdicts, event["probes"]
    close = probe["score"] is not None and abs(probe["score"] - verdict.score) < 2e-3
    return close and tuple(event["fired"]) == outcome.rules


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    case = standard(TinyModel(template=TEMPLATE))["both"]

    def plain(prompt: str) -> bool:
        return all(32 < token < 127 for token in case.expected(prompt, NEW).tokens)

    prompts = [next(filter(plain, case.fired)), next(filter(plain, case.quiet))]
    model = case.model.save_gguf(folder / "tiny.gguf")
    return Tiny(folder, case, model, case.package.save(folder / "guard.gguf"), prompts)


# ------------------------------------------------------------ llama.cpp's own programs

PROMPT, MODEL, STATE = "PROMPT", "MODEL", "STATE"  # filled in
EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", 1, "--temp", 0]
TEXT = ["-m", MODEL, *EXACT, "-p", PROMPT, "-n", NEW]
ONCE = {
    ("llama-simple", "a prompt"): ["-m", MODEL, "-n", NEW, PROMPT],
    ("llama-completion", "a prompt"): [*TEXT, "-no-cnv", "-c", 256],
    ("llama-completion", "a small batch"): [*TEXT, "-no-cnv", "-c", 256, "-b", 8, "-ub", 4],
    ("llama-lookup", "drafts from the context"): [*TEXT, "-c", 256, "--spec-draft-n-max", 3],
    ("llama-lookahead", "drafts by looking ahead"): [*TEXT, "-c", 512],
    ("llama-speculative", "a draft model"): [
        *(*TEXT, "-md", MODEL, "-c", 256, "--spec-type", "draft-simple"),
    ],
    ("llama-batched", "several answers of a prompt"): [
        *("-m", MODEL, *EXACT, "-p", PROMPT, "-n", 40, "-np", 3, "-kvu", "-c", 512),
    ],
}


def filled(tiny: Tiny, arguments: Sequence[object], prompt: str) -> list[object]:
    values = {PROMPT: prompt, MODEL: tiny.model, STATE: tiny.folder / "state.bin"}
    return [values.get(str(a), a) for a in arguments]


def printed(tiny: Tiny, name: str, arguments: Sequence[object], prompt: str) -> tuple[str, Any]:
    """What a program printed behind its prompt. Its last lines may be lost: llama.cpp writes them
    from a thread, which may not come to it before the end."""
    command = [programs.built() / name, *filled(tiny, arguments, prompt)]
    times = 4 if name == "llama-batched" else 1  # once alone, then with each answer
    for _ in range(10):
        done, events = tiny.run(command)
        _, _, behind = done.stdout.rpartition(prompt)
        if done.stdout.count(prompt) == times and len(behind) >= NEW:
            break
    return behind, events


@needs_programs
@pytest.mark.parametrize(("name", "shape"), ONCE)
def test_a_program_of_one_prompt(tiny, tried, name, shape):
    for prompt in tiny.prompts:
        text, events = printed(tiny, name, ONCE[name, shape], prompt)
        assert text.startswith(tiny.text(prompt))
        answers = 3 if name == "llama-batched" else 1
        assert tiny.told(events, [tiny.ids(prompt)] * answers)
    tried(f"{name}, {BUILT}", shape)


@needs_programs
def test_llama_completion_with_a_file_of_the_prompt(tiny, tried):
    arguments = [*TEXT, "-no-cnv", "-c", 256, "--prompt-cache", STATE]
    for prompt in tiny.prompts:
        (tiny.folder / "state.bin").unlink(missing_ok=True)
        for _ in range(2):
            text, events = printed(tiny, "llama-completion", arguments, prompt)
            assert text.startswith(tiny.text(prompt))
            assert tiny.told(events, [tiny.ids(prompt)])
    tried(f"llama-completion, {BUILT}", "a prompt cache in a file")


@needs_programs
def test_llama_parallel(tiny, tried):
    """Its questions are its own, so one client at a time is compared with several."""
    command = [programs.built() / "llama-parallel", "-m", tiny.model, *EXACT, "-n", NEW]
    shapes = {
        "one client": ["-np", 1, "-c", 4096],
        "several clients": ["-np", 3, "-c", 8192],
        "a shared prefix": ["-np", 3, "-c", 8192, "-pps", "-kvu"],
    }
    scores = []
    for shape, options in shapes.items():
        _, events = tiny.run([*command, "-ns", 6, *options])
        verdicts = [e for e in events if e["event"] == "verdict"]
        scores.append(sorted(e["probes"][0]["score"] for e in verdicts))
        assert scores[-1] == pytest.approx(scores[0], abs=1e-4)
        assert len(scores[-1]) == 6
        tried(f"llama-parallel, {BUILT}", shape)


@needs_programs
def test_llama_perplexity(tiny, tried):
    """It reads rows of a prompt that ask for logits behind rows that ask for none, as programs do
    that send drafts with a prompt: what fires is steered from the first of them on."""
    text = tiny.folder / "text.txt"
    text.write_text((tiny.prompts[1] + " ") * 60)
    command = [programs.built() / "llama-perplexity", "-m", tiny.model, *EXACT[:-2], "-f", text]
    known = []
    for steer in (False, True):
        found: list[float] = []
        while len(found) < 8:  # the end may be lost, see `printed`
            done, events = tiny.run([*command, "-c", 128, "-b", 128, "--chunks", 8], steer)
            found = [float(x) for x in re.findall(r"\[\d+\]([\d.]+),", done.stdout)]
        logs = [math.log(x) * i for i, x in enumerate(found, 1)]  # sums of chunks
        known.append([b - a for a, b in itertools.pairwise([0.0, *logs])])
    fired = [bool(e["fired"]) for e in events if e["event"] == "verdict"]
    changed = [abs(a - b) > 1e-3 for a, b in zip(*known, strict=True)]
    assert fired == changed
    assert set(fired) == {True, False}
    tried(f"llama-perplexity, {BUILT}", "texts that do not fire", "not steered")
    tried(f"llama-perplexity, {BUILT}", "texts that fire")


@needs_programs
def test_llama_embedding(tiny, tried):
    """Vectors of texts that do not fire are those of the program alone; others are refused."""
    arguments = ["-m", MODEL, "-t", 1, "-p", PROMPT, "--embd-output-format", "array"]
    fires, quiet = tiny.prompts
    command = [programs.built() / "llama-embedding", *filled(tiny, arguments, quiet)]
    size = 0
    for _ in range(10):  # the end may be lost, see `printed`
        (alone, _), (steered, _) = tiny.run(command, steer=False), tiny.run(command)
        size = min(len(alone.stdout), len(steered.stdout))
        if size > 1000:
            break
    assert steered.stdout[:size] == alone.stdout[:size]
    assert size > 1000
    command = [programs.built() / "llama-embedding", *filled(tiny, arguments, fires)]
    done, events = tiny.run(command, check=False)
    assert done.returncode != 0
    assert [e["reason"] for e in events if e["event"] == "refused"]
    tried(f"llama-embedding, {BUILT}", "texts that do not fire", "not steered")
    tried(f"llama-embedding, {BUILT}", "texts that fire", "refused")


# ------------------------------------------------------------ llama-server


@pytest.fixture(scope="module")
def server(tiny):
    log = tiny.folder / "server.jsonl"
    options = ["-m", tiny.model, *EXACT[:-2], "-c", 2048, "-np", 2, "--no-webui", "--no-warmup"]
    before = [*CLI, "run", "--package", str(tiny.guard), "--log", str(log), "--"]
    with programs.llama_server(
        [*options, "--embeddings", "--jinja"], tiny.folder / "server.txt", before
    ) as url:
        yield Server(url, log)


def completed(server: Server, ids: Sequence[int], **options: Any) -> Any:
    return server.complete(ids, n_predict=NEW, **options)


@needs_programs
def test_bodies_of_llama_server(tiny, tried, server):
    """Fields that change how tokens are chosen, or what is told of them."""
    for prompt in tiny.prompts:
        ids, count = tiny.ids(prompt), len(server.events())
        tokens = list(tiny.expected(ids).tokens)
        assert completed(server, ids, n_probs=3)["tokens"] == tokens
        assert completed(server, ids, logit_bias=[[1, False]])["tokens"] == tokens
        assert completed(server, ids, samplers=["top_k"], top_k=1)["tokens"] == tokens
        again = server.post("/completion", prompt=ids, n_predict=0, temperature=0)
        assert again["tokens_predicted"] <= 1
        letters = completed(server, ids, grammar="root ::= [a-z]+")["content"]
        assert letters.islower()
        number = completed(server, ids, json_schema={"type": "integer"})["content"]
        assert number.strip(" -").isdigit()
        told = server.events(count=count + 5)[count:]
        wanted = tiny.expected(ids, 1).outcome
        assert all(_same(event, wanted) for event in told)
    shapes = ("n_probs", "logit_bias", "samplers", "n_predict 0", "grammar", "JSON schema")
    for shape in shapes:
        tried(f"llama-server, {BUILT}", shape)


@needs_programs
def test_addresses_of_llama_server(tiny, tried, server):
    """The same chat through each address that answers one, and embeddings beside them."""
    for prompt in tiny.prompts:
        ids = tiny.chat(prompt)
        text = bytes(tiny.expected(ids).tokens).decode("latin-1")
        count = len(server.events())
        messages = [{"role": "user", "content": prompt}]
        limits = {"temperature": 0, "max_tokens": NEW}
        chat = server.post("/v1/chat/completions", messages=messages, **limits)
        claude = server.post("/v1/messages", messages=messages, model="tiny", **limits)
        asked = {"input": prompt, "model": "tiny", "temperature": 0, "max_output_tokens": NEW}
        response = server.post("/v1/responses", **asked)
        texts = [
            chat["choices"][0]["message"]["content"],
            claude["content"][0]["text"],
            response["output"][0]["content"][0]["text"],
        ]
        assert texts == [text] * 3
        assert tiny.told(server.events(count=count + 3)[count:], [ids] * 3)
    vectors = [server.post("/embedding", content=tiny.prompts[1])[0]["embedding"] for _ in "12"]
    assert vectors[0] == vectors[1]
    again = server.post("/v1/chat/completions", messages=messages, **limits)
    assert again["choices"][0]["message"]["content"] == text
    program = f"llama-server, {BUILT}"
    for shape in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
        tried(program, shape)
    tried(program, "/embedding", "not steered")


@needs_programs
def test_the_router_of_llama_server(tiny, tried):
    """It starts a server for each model: the guarded one is steered, another is not loaded."""
    models = tiny.folder / "models"
    models.mkdir()
    shutil.copy(tiny.model, models / "tiny.gguf")
    sliding_model.save(models / "other.gguf")
    log = tiny.folder / "router.jsonl"
    before = [*CLI, "run", "--package", str(tiny.guard), "--log", str(log), "--"]
    options = ["--models-dir", models, *EXACT[:-2], "-c", 512, "--no-webui"]
    with programs.llama_server(options, tiny.folder / "router.txt", before) as url:
        server = Server(url, log)
        for prompt in tiny.prompts:
            body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": NEW}
            completion = server.post("/v1/completions", **body)
            assert completion["choices"][0]["text"] == tiny.text(prompt)
        with pytest.raises(AssertionError, match="failed to load"):
            server.post("/v1/completions", model="other", prompt="a", max_tokens=1)
        assert "expected width 32" in server.events("stopped", count=1)[0]["reason"]
    program = f"llama-server, {BUILT}"
    tried(program, "router: the guarded model")
    tried(program, "router: another model", "refused")


# ------------------------------------------------------------ scripts


@pytest.mark.parametrize(
    "shape",
    ["completion", "stream", "echo", "logits_all", "chunks", "drafts", "state", "cache", "beside"],
)
def test_llama_cpp_python(tiny, tried, shape):
    done, events = tiny.run([sys.executable, HERE / "ask.py", shape, tiny.model, *tiny.prompts])
    rounds = 2 if shape == "cache" else 1
    assert json.loads(done.stdout) == [tiny.text(p) for p in tiny.prompts] * rounds
    ids = [tiny.ids(p) for p in tiny.prompts]
    if shape != "beside":
        assert tiny.told(events, ids * rounds)
    else:
        assert tiny.told(events, ids)
        assert tiny.told([e for e in events if e.get("context") != 0], ids[:1])
    tried(SCRIPT, shape)


def test_llama_cpp_python_with_a_grammar(tiny, tried):
    command = [sys.executable, HERE / "ask.py", "grammar", tiny.model, *tiny.prompts]
    (alone, _), (steered, events) = tiny.run(command, steer=False), tiny.run(command)
    plain, found = json.loads(alone.stdout), json.loads(steered.stdout)
    assert found[0] != plain[0]
    assert found[1] == plain[1]
    assert tiny.told(events, [tiny.ids(p) for p in tiny.prompts])
    tried(SCRIPT, "grammar")


def split(tokens: Sequence[int], context: Sequence[int]) -> list[int]:
    """The prompt, given what a sequence holds: its answer follows, but for its last token."""
    for count in (len(tokens), len(tokens) - 1):
        if list(context[len(context) - count :]) == list(tokens[:count]):
            return list(context[: len(context) - count])
    raise AssertionError(f"{tokens} does not end {context}")


NODE = ("completion", "chat", "two sequences", "lookup drafts", "a draft sequence",
        "embeddings beside a chat", "grammar", "JSON schema")  # fmt: skip


@pytest.mark.parametrize("shape", NODE)
def test_node_llama_cpp(tiny, tried, shape):
    release = programs.NODE_LLAMA_CPP[0]
    if (folder := programs.node(release)) is None:
        pytest.skip("python tests/programs.py, and npm")
    script = shutil.copy(HERE / "ask.mjs", folder)
    prompts = [*tiny.prompts, tiny.prompts[0]] if "chat" in shape else tiny.prompts
    command = [shutil.which("node"), script, shape, tiny.model, *prompts]
    done, events = tiny.run(command)
    answers = json.loads(done.stdout)
    ids = [split(a["tokens"], a["context"]) for a in answers]
    if "chat" not in shape:
        assert ids == [tiny.ids(p) for p in prompts]
    assert tiny.told(events, ids)
    if shape in ("grammar", "JSON schema"):
        alone = json.loads(tiny.run(command, steer=False)[0].stdout)
        assert answers[0] != alone[0]
        assert answers[1] == alone[1]
    else:
        assert [a["tokens"] for a in answers] == [list(tiny.expected(i).tokens) for i in ids]
    tried(f"node-llama-cpp {release}", shape)


@pytest.fixture
def importable(monkeypatch):
    """Makes a package of PyPI importable for programs."""

    def found(name: str) -> None:
        if (folder := programs.of_pypi(name)) is None:
            pytest.skip("python tests/programs.py")
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return found


@pytest.mark.parametrize("shape", ["completion", "stream", "chat"])
def test_xllamacpp(tiny, tried, importable, shape):
    """llama.cpp and llama-server's code in one extension module, which exports its symbols."""
    importable("xllamacpp")
    script = HERE / "ask_xllamacpp.py"
    done, events = tiny.run([sys.executable, script, shape, tiny.model, *tiny.prompts])
    ids = [(tiny.chat if shape == "chat" else tiny.ids)(p) for p in tiny.prompts]
    texts = [bytes(tiny.expected(i).tokens).decode("latin-1") for i in ids]
    assert json.loads(done.stdout.splitlines()[-1]) == texts
    assert tiny.told(events, ids)
    tried(f"xllamacpp {programs.PYPI['xllamacpp']}", shape)


def test_cyllama(tiny, tried, importable):
    """llama.cpp hidden in an extension module: the run ends before a token."""
    importable("cyllama")
    lines = (
        "import sys",
        "from cyllama import LLM",
        "print(LLM(sys.argv[1])(sys.argv[2]))",
    )
    command = [sys.executable, "-c", "\n".join(lines), tiny.model, tiny.prompts[0]]
    done, _ = tiny.run(command, check=False)
    assert done.returncode == 78, done.stderr[-2000:]
    assert done.stdout == ""
    tried(f"cyllama {programs.PYPI['cyllama']}", "completion", "refused")


# ------------------------------------------------------------ what doctor says

SAYS = {
    "would work": "would work",
    "would work, if it loads a llama.cpp that is a library of its own": "if llama.cpp is a library",
    "would not work": "would not work",
}


@pytest.fixture
def says(tiny):
    """What `doctor` says of a command, as the table has it, and its exit code."""

    def asked(command: Sequence[object]) -> tuple[str, int]:
        line = [*CLI, "doctor", "--package", tiny.guard, "--", *command]
        done = subprocess.run(
            list(map(str, line)), capture_output=True, encoding="utf-8", check=False
        )
        return SAYS[done.stdout.strip().splitlines()[-1].partition(";")[0]], done.returncode

    return asked


@needs_programs
@pytest.mark.parametrize("name", programs.TARGETS)
def test_doctor_says_of_llama_cpp_what_happens(tiny, tried, says, name):
    said, code = says([programs.built() / name, "-m", tiny.model])
    assert code == 0
    tried.doctor(f"{name}, {BUILT}", said)


@needs_programs
def test_doctor_says_that_a_model_does_not_fit(tiny, says, tmp_path):
    other = sliding_model.save(tmp_path / "other.gguf")
    command = [programs.built() / "llama-simple", "-m", other, "a"]
    assert says(command) == ("would not work", 1)
    done, _ = tiny.run(command, check=False)
    assert done.returncode != 0
    assert done.stdout == ""


def test_doctor_says_of_scripts_what_happens(tiny, tried, says, importable):
    """That depends on what they import: it says so."""
    python, node = sys.executable, shutil.which("node")
    said = {SCRIPT: says([python, HERE / "ask.py", "completion", tiny.model])}
    for release in programs.NODE_LLAMA_CPP if node else ():
        said[f"node-llama-cpp {release}"] = says([node, HERE / "ask.mjs", "chat", tiny.model])
    for name in programs.PYPI:
        importable(name)
        said[f"{name} {programs.PYPI[name]}"] = says([python, "-c", f"import {name}", tiny.model])
    for program, (text, code) in said.items():
        assert (text, code) == ("if llama.cpp is a library", 0)
        tried.doctor(program, text)
