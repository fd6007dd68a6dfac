"""`steerbridge run` with a plain llama-cpp-python script."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest

import helpers
from helpers import (
    CLI,
    LOW_RANK,
    MEAN,
    compiled,
    head,
    json_lines,
    last_json,
    linear_probe,
    reading,
    rule,
)

pytest.importorskip("elftools", reason="needs the extra `run`")
from steerbridge import gguf_model, load
from steerbridge.fingerprint import file_sha256
from steerbridge.testing.model import TinyModel
from steerbridge_run import preload


def package(path, limit, folder, readings=None, act=None):
    """A saved package for SmolLM2 with one probe."""
    act = act or head(weight=LOW_RANK, eps=3.0)
    made = helpers.package(
        gguf_model.read_facts(path),
        scale=0.05,
        probes=[linear_probe(readings=readings or [reading("layer_input[22]")], threshold=limit)],
        interventions=[act],
        rules=[rule(["p"], [act["id"]])],
    )
    return made.save(folder / f"{limit:g}.gguf")


def test_the_environment_names_what_the_preload_needs(tmp_path, smollm2_path):
    from steerbridge.package import load

    end = load(package(smollm2_path, 1, tmp_path))
    before = {"LD_PRELOAD": "/other.so", "HOME": "/h"}
    file = tmp_path / "p"
    file.write_bytes(b"a package")
    made = preload.environment(end, file, tmp_path / "e", [smollm2_path], before)
    assert made["STEERBRIDGE_PACKAGE_SHA256"] == hashlib.sha256(b"a package").hexdigest()
    assert made["LD_PRELOAD"] == f"{preload.library()}:/other.so"
    assert made["STEERBRIDGE_UNSTEERED"] == "llama:576:30"
    assert made["STEERBRIDGE_VOCABULARY"] == "49152"
    assert made["STEERBRIDGE_TOKENIZER"] == end.spec.base_model.tokenizer_sha256
    assert made["STEERBRIDGE_TEMPLATE"] == end.spec.base_model.chat_template_sha256
    assert made["HOME"] == "/h"
    assert made["STEERBRIDGE_IGNORE"] == ""
    ignore = ["vocab_size", "chat_template_sha256"]
    made = preload.environment(end, file, tmp_path / "e", [], before, ignore=ignore)
    assert made["STEERBRIDGE_VOCABULARY"] == made["STEERBRIDGE_TEMPLATE"] == ""
    assert made["STEERBRIDGE_TOKENIZER"]
    assert made["STEERBRIDGE_IGNORE"] == "vocab_size,chat_template_sha256"


SCRIPT = """
import json, sys
import llama_cpp
options = json.loads(sys.argv[2])
llama = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=2, verbose=False, **options)
for text in sys.argv[3:]:
    prompt = llama.tokenize(text.encode())
    tokens = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == 8:
            break
    print(json.dumps(tokens), flush=True)
"""
TEXTS = [  # the last one is cached but for one row
    "The three colours of the flag are",
    "The three colours of the sky are",
    "My name is",
    "My name is",
]


def script(folder):
    path = folder / "app.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return [sys.executable, str(path)]


def steered(guard, command, *options, log=None, check=True):
    """Runs a command under `steerbridge run`; returns the finished process and its events."""
    log = log or guard.with_suffix(".jsonl")
    done = subprocess.run(
        [*CLI, "run", "--package", str(guard), "--log", str(log), *options, "--", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    events = json_lines(log.read_text()) if log.exists() else []
    return done, events


def answers(done):
    return json_lines(done.stdout)


@pytest.mark.parametrize("position", ["prompt_end", "mean"])
def test_a_script_answers_as_the_adapter_does(tmp_path, smollm2_path, position):
    """The prompts share a prefix, so later ones start with cached rows."""
    pytest.importorskip("llama_cpp")
    from steerbridge_llama_cpp import SteeredLlama

    readings = [reading("layer_input[22]", *([MEAN] if position == "mean" else []))]
    command = [*script(tmp_path), str(smollm2_path), "{}", *TEXTS]
    plain = answers(subprocess.run(command, capture_output=True, text=True, check=True))
    quiet, events = steered(package(smollm2_path, 1e9, tmp_path, readings), command)
    assert answers(quiet) == plain
    assert [e["event"] for e in events] == ["active", *["verdict"] * len(TEXTS)]
    scores = sorted(e["probes"][0]["score"] for e in events[1:])
    limit = (scores[0] + scores[1]) / 2  # all but one fire
    guard = package(smollm2_path, limit, tmp_path, readings)
    got, events = steered(guard, command)
    llama = SteeredLlama(
        str(smollm2_path), package=str(guard), n_ctx=512, n_threads=2, verbose=False
    )
    for text, tokens, event, unsteered in zip(TEXTS, answers(got), events[1:], plain, strict=True):
        llama.reset()
        want = []
        for token in llama.generate(llama.tokenize(text.encode()), temp=0.0, repeat_penalty=1.0):
            want.append(token)
            if len(want) == 8:
                break
        outcome = llama.steering_session.outcomes[0]
        assert bool(event["fired"]) == bool(outcome.fired)
        assert event["probes"][0]["score"] == pytest.approx(outcome.verdicts[0].score, rel=1e-3)
        assert tokens == want
        assert event["fired"] or tokens == unsteered
    llama.close()


def test_a_program_without_a_model_ends_with_an_error(tmp_path, smollm2_path):
    guard = package(smollm2_path, 1, tmp_path)
    done, events = steered(guard, [sys.executable, "-c", "print('[1]')"], check=False)
    assert answers(done) == [[1]]
    assert events == []
    assert done.returncode == 78
    assert "nothing was steered" in done.stderr


def test_another_model_ends_the_program_before_its_first_token(tmp_path, smollm2_path):
    pytest.importorskip("llama_cpp")
    facts = gguf_model.read_facts(smollm2_path)
    for change, reason in (({"num_layers": 28}, "blocks"), ({"vocab_size": 49160}, "vocabulary")):
        from dataclasses import replace

        made = helpers.package(
            replace(facts, **change),
            probes=[linear_probe(readings=[reading("layer_input[22]")])],
            interventions=[head(weight=LOW_RANK)],
            rules=[rule(["p"], ["h"])],
        )
        guard = made.save(tmp_path / f"{reason}.gguf")
        command = [*script(tmp_path), str(smollm2_path), "{}", *TEXTS]
        done, events = steered(guard, command, check=False)
        assert done.returncode == 78
        assert done.stdout == ""
        assert reason in done.stderr
        assert [e["event"] for e in events] == ["stopped"]
        named, _ = steered(guard, [*command, "-m", str(smollm2_path)], check=False)
        assert named.returncode == 1  # seen on the command line: not even started
        assert "does not fit this model" in named.stderr


def test_a_preload_without_a_package_stops_the_program(tmp_path, smollm2_path):
    pytest.importorskip("llama_cpp")
    environment = {**os.environ, "LD_PRELOAD": str(preload.library())}
    command = [*script(tmp_path), str(smollm2_path), "{}", *TEXTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "STEERBRIDGE_PACKAGE" in done.stderr
    assert done.stdout == ""


def test_logits_of_a_whole_prompt_change_nothing(tmp_path, smollm2_path):
    """Each row of it asks for logits, and they are read all at once; the last one is used."""
    pytest.importorskip("llama_cpp")
    told = []
    for options in ('{"logits_all": true}', "{}"):
        command = [*script(tmp_path), str(smollm2_path), options, *TEXTS]
        guard = package(smollm2_path, 1, tmp_path)
        done, events = steered(guard, command, log=tmp_path / f"{len(told)}.jsonl")
        verdicts = [(e["probes"][0]["score"], e["fired"]) for e in events[1:]]
        told.append((answers(done), verdicts))
    assert told[0] == told[1]
    assert len(told[0][1]) == len(TEXTS)


@pytest.mark.native
def test_doctor_says_what_would_happen(tmp_path, smollm2_path):
    guard = package(smollm2_path, 1, tmp_path)
    tower = TinyModel(pictures=True).save_mmproj(tmp_path / "mmproj.gguf")
    command = [sys.executable, "-m", str(smollm2_path), "--mmproj", str(tower)]
    done = subprocess.run(
        [*CLI, "doctor", "--json", "--package", str(guard), "--", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    report = last_json(done.stdout)
    assert report["problems"] == []
    assert report["model"]["architecture"] == "llama"
    assert report["model"]["tried"] == "models of it were steered"
    assert report["model"]["pictures"].startswith("idefics3: rows as in transformers")
    bad = compiled(tmp_path, "int main(void) { return 0; }", "-static")
    done = subprocess.run(
        [*CLI, "doctor", "--", str(bad)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "statically" in done.stdout


@pytest.fixture(scope="module")
def checkpoint(smollm2_path, tmp_path_factory):
    """The same shape with other weights: a run of quantised bytes changed."""
    path = tmp_path_factory.mktemp("checkpoint") / "other.gguf"
    path.write_bytes(smollm2_path.read_bytes())
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        some = file.read(1 << 20)
        file.seek(-len(some), os.SEEK_CUR)
        file.write(bytes(byte ^ 1 for byte in some))
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_a_calibration_is_of_one_checkpoint(tmp_path, smollm2_path, checkpoint, mmap):
    """Under `run` and in process: another one of the same shape keeps the package's thresholds."""
    from steerbridge.spec import Calibration
    from steerbridge_llama_cpp import SteeredLlama

    quiet = load(package(smollm2_path, 1e9, tmp_path))
    fitted = Calibration(
        runtime="llama.cpp",
        quantisation="Q4_1",
        weights=file_sha256(smollm2_path),
        thresholds={"p": -1e9},
    )
    guard = quiet.replace(calibrations=(fitted,)).save(tmp_path / "guard.gguf")
    for model in (smollm2_path, checkpoint):
        command = [*script(tmp_path), str(model), json.dumps({"use_mmap": mmap}), "My name is"]
        _, events = steered(guard, command, log=tmp_path / f"{model.stem}.jsonl")
        active, verdict = events
        assert active["calibrated"] == (model == smollm2_path)
        threshold = -1e9 if model == smollm2_path else 1e9
        assert verdict["probes"][0]["threshold"] == threshold
        llama = SteeredLlama(str(model), package=str(guard), n_ctx=64, verbose=False)
        assert llama.steering_session.package.spec.probes[0].threshold == threshold
        llama.close()


def test_a_checkpoint_that_is_not_known_takes_no_calibration(tmp_path, smollm2_path, checkpoint):
    """Both files are open: which one the context has is not seen."""
    from steerbridge.spec import Calibration

    fitted = Calibration(
        runtime="llama.cpp",
        quantisation="Q4_1",
        weights=file_sha256(smollm2_path),
        thresholds={"p": -1e9},
    )
    quiet = load(package(smollm2_path, 1e9, tmp_path))
    guard = quiet.replace(calibrations=(fitted,)).save(tmp_path / "guard.gguf")
    app = tmp_path / "two.py"
    app.write_text(
        "import llama_cpp, sys\n"
        "models = [llama_cpp.Llama(path, n_ctx=64, verbose=False) for path in sys.argv[1:]]\n"
        "for model in models:\n"
        "    model.eval(model.tokenize(b'My name is'))\n"
        "    model.scores[0]\n"
    )
    _, events = steered(guard, [sys.executable, str(app), str(smollm2_path), str(checkpoint)])
    known = [e["calibrated"] for e in events if e["event"] == "active"]
    assert known[-1] is False
