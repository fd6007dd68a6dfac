"""`make test-apps`: a package inside unmodified one-prompt programs and node-llama-cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

import programs

pytest.importorskip("elftools", reason="needs the extra `run`")
pytest.importorskip("llama_cpp", reason="needs the extra `llama-cpp`")
from guarded import NEW, Guarded
from helpers import json_lines

pytestmark = [pytest.mark.apps, pytest.mark.llama_cpp]


needs_programs = pytest.mark.skipif(programs.built() is None, reason="python tests/programs.py")


def ran(case: Guarded, command, steer=True, environment=None):
    """The program's output, and which prompts fired if it was steered."""
    log = case.guard.with_suffix(".once.jsonl")
    log.unlink(missing_ok=True)
    prefix = case.steer(log)
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
    events = json_lines(log.read_text()) if steer else []
    return done.stdout, [bool(e["fired"]) for e in events if e["event"] == "verdict"]


@needs_programs
@pytest.mark.parametrize("i", [0, 1])
def test_llama_cli(guarded_text, tried, i):
    command = [
        *(
            str(programs.built() / "llama-cli"),
            *guarded_text.options,
            "-st",
            "-t",
            "2",
            "-c",
            "1024",
        ),
        *("--temp", "0", "-n", str(NEW), "--no-display-prompt", "-p", guarded_text.prompts[i].text),
    ]
    plain, _ = ran(guarded_text, command, steer=False)
    got, fired = ran(guarded_text, command)
    assert fired[-1] == guarded_text.prompts[i].harmful  # the first ones are of its warm-up
    assert guarded_text.steered[i].text.strip() in got
    if not guarded_text.prompts[i].harmful:
        assert answer_of(got) == answer_of(plain)
    tried(f"llama-cli, {programs.llama_cpp()}", "a chat of one prompt")


def answer_of(output: str) -> str:
    """Removes the lines that depend on time: the spinner and the speeds."""
    kept = [s for s in output.splitlines() if " t/s" not in s and "Loading model" not in s]
    return "\n".join(kept)


@needs_programs
@pytest.mark.parametrize("i", [0, 1])
def test_llama_mtmd_cli(guarded_pictures, tried, i):
    prompt = guarded_pictures.prompts[i]
    command = [
        *(
            str(programs.built() / "llama-mtmd-cli"),
            *guarded_pictures.options,
            "--jinja",
            "-t",
            "2",
        ),
        *("--image", str(prompt.images[0]), "-p", prompt.text, "-c", "1024", "--temp", "0"),
        *("-n", str(NEW)),
    ]
    plain, _ = ran(guarded_pictures, command, steer=False)
    got, fired = ran(guarded_pictures, command)
    assert fired[-1] == prompt.harmful
    # A program that ends loses what its log's thread still has.
    wanted = guarded_pictures.steered[i].text if prompt.harmful else plain
    shorter, longer = sorted((got.strip(), wanted.strip()), key=len)
    assert longer.startswith(shorter)
    tried(f"llama-mtmd-cli, {programs.llama_cpp()}", "a picture and a text")


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
def test_node_llama_cpp(guarded_means, tried, release):
    """Its prebuilt llama.cpp has another version than that of llama-cpp-python."""
    if (folder := programs.node(release)) is None:
        pytest.skip("python tests/programs.py, and npm")
    path = folder / "app.mjs"
    path.write_text(NODE.replace("NEW", str(NEW)))
    command = [
        shutil.which("node"),
        str(path),
        str(guarded_means.model),
        *map(str, guarded_means.rendered),
    ]
    plain, _ = ran(guarded_means, command, steer=False)
    got, fired = ran(guarded_means, command)
    assert fired == [p.harmful for p in guarded_means.prompts]
    answers = [[tuple(json.loads(line)) for line in out.splitlines()] for out in (got, plain)]
    for i, (steered, unsteered) in enumerate(zip(*answers, strict=True)):
        assert steered == (
            guarded_means.steered[i].tokens if guarded_means.prompts[i].harmful else unsteered
        )
    tried(f"node-llama-cpp {release}", "evaluate")
