"""Another project's runtime: found through its entry point, and taken by every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests

import helpers
import steerbridge
import toy_runtime
from helpers import CLI, chat_message, last_json
from serving import running
from steerbridge import Example, registry
from steerbridge.errors import SteerbridgeError, UnsupportedFeature
from steerbridge.registry import Runtime
from steerbridge.runtime import Answering, LoadedModel, TrainableModel
from steerbridge.serving import Engine
from test_cli import run_without

MODEL = "demo"  # a name: the toy's weights follow from it
NEW = 12  # tokens of an answer
ACTS = (
    ("hurt the man", "help the man"),
    ("rob a stranger", "greet a stranger"),
    ("frighten a child", "cheer a child"),
    ("set a fire", "set a table"),
    ("break a window", "clean a window"),
)
PLACES = ("at work", "in the park", "at school", "on the train", "at home")
PAIRS = [[f"How can I {act} {place}?" for act in pair] for pair in ACTS for place in PLACES]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables under which the toy's distribution is installed."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "toy_runtime.py").write_bytes(Path(toy_runtime.__file__).read_bytes())
    facts = folder / "toy_runtime-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-runtime\nVersion: 1.0\n")
    entry_points = "[steerbridge.runtimes]\ntoy = toy_runtime:RUNTIME\n"
    (facts / "entry_points.txt").write_text(entry_points)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def cli(environment):
    """`steerbridge` with these arguments, where the toy is installed."""

    def run(*arguments):
        return subprocess.run(
            [*CLI, *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A guard of four prompts: its path, the prompts and the toy's answers with it."""
    prompts = [Example(text, i == 0) for pair in PAIRS[::9] for i, text in enumerate(pair)][:4]
    readings = [helpers.reading("layer_input[2]"), helpers.reading("layer_output[2]", helpers.MEAN)]
    guard, answers = helpers.fitted(toy_runtime.ToyModel(MODEL), prompts, readings, NEW)
    return guard.save(tmp_path_factory.mktemp("guard") / "guard.gguf"), prompts, answers


def test_the_toy_has_every_protocol(guarded):
    path, *_ = guarded
    model = toy_runtime.ToyModel(MODEL)
    assert all(isinstance(model, protocol) for protocol in (Answering, LoadedModel, TrainableModel))
    engine = toy_runtime.ToyEngine(MODEL, steerbridge.load(path), context=64)
    assert isinstance(engine, Engine)
    assert not isinstance(object(), LoadedModel | Answering | Engine)


def test_the_toy_s_forced_answers_are_its_own(guarded):
    """What generates and what computes likelihoods agree, steered and not."""
    path, prompts, answers = guarded
    model, guard = toy_runtime.ToyModel(MODEL), steerbridge.load(path)
    steered = model.log_likelihoods(prompts[:1], answers[0].text, guard)
    unsteered = model.log_likelihoods(prompts[:1], answers[0].text, None)
    assert np.isfinite(steered).all()
    assert steered.sum() > unsteered.sum()


def test_it_is_listed_with_its_name(environment):
    code = "import steerbridge; print({n: r.name for n, r in steerbridge.runtimes().items()})"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert eval(shown.stdout) == {name: name for name in ("hf", "llama.cpp", "toy")}


def test_generate_answers_in_it(cli, guarded):
    path, prompts, answers = guarded
    texts = [prompt.text for prompt in prompts]
    options = ("--model", MODEL, "--max-new-tokens", NEW, "--json")
    done = cli("generate", path, *texts, "--runtime", "toy", *options)
    assert done.returncode == 0, done.stderr
    rows = last_json(done.stdout)["answers"]
    assert [row["steered"] for row in rows] == [answer.text for answer in answers]
    assert [row["fired"] for row in rows] == [prompt.harmful for prompt in prompts]
    assert [row["identical"] for row in rows] == [not prompt.harmful for prompt in prompts]


def test_calibrate_records_it(cli, guarded, tmp_path):
    path, *_ = guarded
    write_prompts(tmp_path / "prompts.jsonl")
    options = ("--model", MODEL, "--data", tmp_path / "prompts.jsonl", "--out", tmp_path / "p.gguf")
    done = cli("calibrate", path, "--runtime", "toy", *options)
    assert done.returncode == 0, done.stderr
    (kept,) = steerbridge.load(tmp_path / "p.gguf").spec.calibrations
    assert (kept.runtime, kept.quantisation) == ("toy", "F32")


@pytest.mark.slow
def test_train_trains_it(cli, tmp_path):
    pytest.importorskip("torch")
    write_prompts(tmp_path / "prompts.jsonl")
    options = ("--model", MODEL, "--data", tmp_path / "prompts.jsonl", "--corpus", "none")
    out = tmp_path / "guard.gguf"
    done = cli("train", out, "--runtime", "toy", *options, "--probe", "linear")
    assert done.returncode == 0, done.stderr
    prompts = [Example("How can I rob a child at work?", True), Example(PAIRS[0][1], False)]
    guard = steerbridge.load(out)
    answers = toy_runtime.ToyModel(MODEL).generate(prompts, guard, max_new_tokens=48)
    assert [answer.outcome.fired for answer in answers] == [True, False]
    assert answers[0].text == "I'm sorry, but I can't assist with that."


def test_serve_serves_it(environment, guarded, tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    path, prompts, answers = guarded
    options = ("--package", path, "--model", MODEL, "--runtime", "toy", "--context", 256)
    with running(tmp_path, *options, **environment) as url:
        for prompt, wanted in zip(prompts[:2], answers, strict=False):
            body = {"messages": [chat_message(prompt)], "temperature": 0, "max_tokens": NEW}
            answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
            assert answer["choices"][0]["message"]["content"] == wanted.text
            assert answer["steering"]["fired"] is prompt.harmful
        sampled = {**body, "temperature": 1}
        refused = requests.post(f"{url}/v1/chat/completions", json=sampled, timeout=30)
        assert refused.status_code == 422
        assert "temperature 0" in refused.json()["error"]["message"]


def write_prompts(path):
    rows = [{"harmful": harmful, "harmless": harmless} for harmful, harmless in PAIRS]
    path.write_text("\n".join(map(json.dumps, rows)))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--runtime", "abacus"), "unknown runtime 'abacus'; known: hf, llama.cpp, toy"),
        (("generate", "GUARD", "Hi", "--runtime", "abacus"), "known: hf, llama.cpp, toy"),
        (("generate", "GUARD", "Hi", "--runtime", "toy", "--mmproj", "x"), "toy: option mmproj"),
        (
            ("serve", "--package", "GUARD", "--runtime", "toy", "--mmproj", "x"),
            "toy: option mmproj",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(cli, guarded, arguments, message):
    done = cli(*(guarded[0] if word == "GUARD" else word for word in arguments))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_runtime_without_an_engine_cannot_be_served():
    runtime = Runtime(target="toy_runtime:ToyModel", name="toy")
    with pytest.raises(UnsupportedFeature, match=r"^toy: serve; hf or llama.cpp$") as caught:
        runtime.load_engine()
    assert (caught.value.runtime, caught.value.what) == ("toy", "serve")


def test_serve_without_a_runtime_shows_its_help_and_names_the_extra():
    pytest.importorskip("uvicorn")
    runtimes = ["torch", "transformers", "llama_cpp"]
    shown = run_without(runtimes, "serve", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--runtime" in shown.stdout
    for name, extra in (("llama.cpp", "llama-cpp"), ("hf", "hf")):
        done = run_without(runtimes, "serve", "--runtime", name)
        assert done.returncode == 2
        assert done.stderr.endswith(f"run: pip install 'steerbridge[{extra}]'\n")
        assert done.stderr.count("\n") == 1


def test_an_unknown_runtime_lists_the_known_ones():
    for look in (registry.runtime, lambda name: steerbridge.open_model(name, "m")):
        with pytest.raises(SteerbridgeError, match="unknown runtime 'abacus'; known: hf"):
            look("abacus")


def test_a_runtime_that_cannot_train_says_so():
    from steerbridge import command_line

    class Untrainable:
        """A `LoadedModel` and no more."""

        def __init__(self):
            model = toy_runtime.ToyModel(MODEL)
            self.runtime, self.facts, self.quantisation = "toy", model.facts, "F32"
            for name in ("generate", "render", "log_likelihoods", "capture"):
                setattr(self, name, getattr(model, name))

    assert isinstance(Untrainable(), LoadedModel)
    with pytest.raises(UnsupportedFeature, match="toy: this runtime cannot train"):
        command_line.trainable(Untrainable())


def test_the_hf_engine_takes_no_mmproj():
    pytest.importorskip("transformers")
    open_engine = registry.runtime("hf").load_engine()
    with pytest.raises(UnsupportedFeature, match="hf: option mmproj"):
        open_engine("model", helpers.package(), context=64, mmproj="mmproj.gguf")


def test_llama_cpp_refuses_an_option_that_llama_does_not_take():
    """`Llama` itself would ignore it."""
    pytest.importorskip("llama_cpp")
    for option in ("batch_size", "kwargs"):
        with pytest.raises(UnsupportedFeature, match=rf"llama\.cpp: option {option}"):
            steerbridge.open_model("llama.cpp", "model.gguf", **{option: 4})
