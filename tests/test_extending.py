"""examples/extending, which docs/extending.md shows: another project's runtime, format and command.

The distribution is installed outside of the repository, and found through its entry points.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import requests

import helpers
import steerbridge
from helpers import CLI, chat_message, last_json
from serving import running
from steerbridge import Example, registry
from steerbridge.errors import SteerbridgeError, UnreadableSource, UnsupportedFeature
from steerbridge.registry import Runtime
from steerbridge.runtime import Answering, LoadedModel, TrainableModel
from steerbridge.serving import Engine
from steerbridge.testing import Ground, OpenerDriver, TinyModel, check_runtime
from steerbridge.testing.model import TEMPLATE
from test_cli import run_without

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "extending"
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

RIGHT = (
    "a quiet prompt",
    "a prompt that fires",
    "prompts of one token",
    "a batch of eight",
    "an answer of many tokens",
    "a further turn, behind the answer",
    "reading: several places",
    "intervention: a head and a vector",
    "rule: unconditional, a vector at all positions",
    "rule: strength by score",
    "rule: two rules of two probes",
    "a state that is not a number",
    "an infinite state that a sigmoid would hide",
    "a prompt shorter than its reading needs",
    "a package for another model",
    "a package for another chat template",
)


# ---------------------------------------------------------------- installed elsewhere


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the modules, and one with the metadata that pip would write."""
    modules, metadata = (tmp_path_factory.mktemp(name) for name in ("modules", "metadata"))
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    for name in project["tool"]["setuptools"]["py-modules"]:
        shutil.copy(SOURCE / f"{name}.py", modules)
    name, version = project["project"]["name"], project["project"]["version"]
    facts = metadata / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines))
    return modules, metadata


@pytest.fixture(scope="module")
def environment(installed):
    """Variables under which the distribution is installed."""
    return {"PYTHONPATH": os.pathsep.join(map(str, installed))}


@pytest.fixture(scope="module")
def cli(environment):
    """`steerbridge` with these arguments, where the distribution is installed."""

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
def toy(installed):
    """A module of the distribution by name; this process sees no entry point of it."""
    modules, _ = installed
    sys.path.insert(0, str(modules))
    yield importlib.import_module
    sys.path.remove(str(modules))
    for name in [n for n, m in sys.modules.items() if n.startswith("toy_") and _is_in(m, modules)]:
        del sys.modules[name]


def _is_in(module, folder):
    return Path(getattr(module, "__file__", None) or "/").is_relative_to(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny random model, with a chat template."""
    return TinyModel(template=TEMPLATE).save_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def guarded(toy, model, tmp_path_factory):
    """A guard of four prompts: its path, the prompts and the toy's answers with it."""
    prompts = [Example(text, i == 0) for pair in PAIRS[::9] for i, text in enumerate(pair)][:4]
    readings = [helpers.reading("layer_input[2]"), helpers.reading("layer_output[2]", helpers.MEAN)]
    opened = toy("toy_runtime").ToyModel(model)
    guard, answers = helpers.fitted(opened, prompts, readings, NEW)
    return guard.save(tmp_path_factory.mktemp("guard") / "guard.gguf"), prompts, answers


def write_prompts(path):
    rows = [{"harmful": harmful, "harmless": harmless} for harmful, harmless in PAIRS]
    path.write_text("\n".join(map(json.dumps, rows)))


# ---------------------------------------------------------------- the runtime


@pytest.mark.slow
def test_the_conformance_kit_finds_the_toy_right(toy, tmp_path):
    """It refuses what came with spec 1.1, and what is absent is what an opener cannot be asked
    for."""
    driver = OpenerDriver("toy", toy("toy_runtime").ToyModel)
    results = check_runtime(driver, Ground(tmp_path))
    others = {n: r for n, r in results.items() if r.status not in ("right", "absent")}
    assert {r.status for r in others.values()} == {"refused"}
    assert all("rows of" in r.detail or r.detail.endswith(": say") for r in others.values())
    assert {name for name in RIGHT if results[name].status != "right"} == set()
    assert sum(r.status == "right" for r in results.values()) >= 80


def test_the_toy_has_every_protocol(toy, model, guarded):
    path, *_ = guarded
    opened = toy("toy_runtime").ToyModel(model)
    for protocol in (Answering, LoadedModel, TrainableModel):
        assert isinstance(opened, protocol)
    engine = toy("toy_engine").ToyEngine(model, steerbridge.load(path), context=64)
    assert isinstance(engine, Engine)
    assert not isinstance(object(), LoadedModel | Answering | Engine)


def test_the_toy_s_forced_answers_are_its_own(toy, model, guarded):
    """What generates and what computes likelihoods agree, steered and not."""
    path, prompts, answers = guarded
    opened, guard = toy("toy_runtime").ToyModel(model), steerbridge.load(path)
    steered = opened.log_likelihoods(prompts[:1], answers[0].text, guard)
    unsteered = opened.log_likelihoods(prompts[:1], answers[0].text, None)
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
    assert eval(shown.stdout) == {name: name for name in ("hf", "llama.cpp", "toy", "vllm")}


def test_generate_answers_in_it(cli, model, guarded):
    path, prompts, answers = guarded
    texts = [prompt.text for prompt in prompts]
    options = ("--model", model, "--max-new-tokens", NEW, "--json")
    done = cli("generate", path, *texts, "--runtime", "toy", *options)
    assert done.returncode == 0, done.stderr
    rows = last_json(done.stdout)["answers"]
    assert [row["steered"] for row in rows] == [answer.text for answer in answers]
    assert [row["fired"] for row in rows] == [prompt.harmful for prompt in prompts]
    assert [row["identical"] for row in rows] == [not prompt.harmful for prompt in prompts]


def test_calibrate_records_it(cli, model, guarded, tmp_path):
    path, *_ = guarded
    write_prompts(tmp_path / "prompts.jsonl")
    options = ("--model", model, "--data", tmp_path / "prompts.jsonl", "--out", tmp_path / "p.gguf")
    done = cli("calibrate", path, "--runtime", "toy", *options)
    assert done.returncode == 0, done.stderr
    (kept,) = steerbridge.load(tmp_path / "p.gguf").spec.calibrations
    assert (kept.runtime, kept.quantisation) == ("toy", "F32")


@pytest.mark.slow
def test_train_trains_it(cli, toy, model, tmp_path):
    """A random model knows no harm, so its guard only has to be better than a guess."""
    pytest.importorskip("torch")
    write_prompts(tmp_path / "prompts.jsonl")
    options = ("--model", model, "--data", tmp_path / "prompts.jsonl", "--corpus", "none")
    out = tmp_path / "guard.gguf"
    options += ("--reads", "whole", "--refuse", "head_matrix", "--fpr", "0.2")
    done = cli("train", out, "--runtime", "toy", *options, "--probe", "linear")
    assert done.returncode == 0, done.stderr
    prompts = [Example(text, i == 0) for pair in PAIRS for i, text in enumerate(pair)]
    opened, guard = toy("toy_runtime").ToyModel(model), steerbridge.load(out)
    answers = opened.generate(prompts, guard, max_new_tokens=1)
    fired = {side: sum(a.outcome.fired for a in answers[side::2]) for side in (0, 1)}
    assert fired[0] >= 2 * fired[1]
    assert fired[0] > len(PAIRS) // 4


def test_serve_serves_it(environment, model, guarded, tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    path, prompts, answers = guarded
    options = ("--package", path, "--model", model, "--runtime", "toy", "--context", 256)
    with running(tmp_path, *options, **environment) as url:
        for prompt, wanted in zip(prompts[:2], answers, strict=False):
            body = {"messages": [chat_message(prompt)], "temperature": 0, "max_tokens": NEW}
            answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
            assert answer["choices"][0]["message"]["content"] == wanted.text
            assert answer["steering"]["fired"] is prompt.harmful
        sampled = {**body, "temperature": 1}
        refused = requests.post(f"{url}/v1/chat/completions", json=sampled, timeout=30)
        assert refused.status_code == 422
        assert "temperature is not supported" in refused.json()["error"]["message"]


# ---------------------------------------------------------------- the command and the format


def test_the_command_is_listed_and_runs(cli, guarded):
    path, *_ = guarded
    assert "List the tensors of a package." in cli("--help").stdout
    shown = cli("tensors", path, "--values").stdout.splitlines()
    assert [line.split()[0] for line in shown] == list(steerbridge.load(path).tensors)
    assert "F32  64 " in shown[[line.split()[0] for line in shown].index("p.w")]
    done = cli("tensors", "nothing.gguf")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_the_format_is_listed_with_its_option(cli):
    shown = cli("formats").stdout
    assert "Toy vectors (JSON)" in shown
    assert "factor that the vectors were used with" in shown


def test_convert_takes_the_format_both_ways(cli, guarded, tmp_path):
    """There and back again: the vectors are the same bits."""
    base, *_ = guarded
    vectors = {"1": [0.1 * i for i in range(32)], "2": [1.5] * 32}
    rounded = {block: [float(np.float32(x)) for x in v] for block, v in vectors.items()}
    source, package, back = (tmp_path / n for n in ("vectors.json", "p.gguf", "back.json"))
    source.write_text(json.dumps({"toy_vectors": rounded}))
    done = cli("convert", source, package, "--base", base, "--set", "strength=1")
    assert done.returncode == 0, done.stderr
    assert [t.vector for t in steerbridge.load(package).spec.interventions[0].targets] == [
        "vector.1",
        "vector.2",
    ]
    done = cli("convert", package, back, "--to", "toy")
    assert done.returncode == 0, done.stderr
    assert json.loads(back.read_text()) == {"toy_vectors": rounded}


def test_convert_asks_and_refuses(cli, guarded, tmp_path):
    base, *_ = guarded
    source = tmp_path / "vectors.json"
    source.write_text(json.dumps({"toy_vectors": {"1": [0.5] * 32}}))
    done = cli("convert", source, tmp_path / "p.gguf", "--base", base)
    assert done.returncode == 1
    assert "strength" in done.stderr
    done = cli("convert", base, tmp_path / "back.json", "--to", "toy")  # a head matrix
    assert done.returncode == 1
    assert "toy" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["{}", '{"toy_vectors": 1}', '{"toy_vectors": {"1": ["x"]}}'])
def test_a_malformed_file_is_a_typed_error(toy, tmp_path, content):
    path = tmp_path / "vectors.json"
    path.write_text(content)
    with pytest.raises(UnreadableSource, match="toy_vectors"):
        toy("toy_format").ToyFormat().contents(path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("serve", "--runtime", "abacus"),
            "unknown runtime 'abacus'; known: hf, llama.cpp, toy, vllm",
        ),
        (("generate", "GUARD", "Hi", "--runtime", "abacus"), "known: hf, llama.cpp, toy, vllm"),
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


def test_a_runtime_that_cannot_train_says_so(toy, model):
    from steerbridge import command_line

    class Untrainable:
        """A `LoadedModel` and no more."""

        def __init__(self):
            opened = toy("toy_runtime").ToyModel(model)
            self.runtime, self.facts, self.quantisation = "toy", opened.facts, "F32"
            self.weights_sha256 = opened.weights_sha256
            for name in ("generate", "render", "log_likelihoods", "capture", "trace"):
                setattr(self, name, getattr(opened, name))

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
