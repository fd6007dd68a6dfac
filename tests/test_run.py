"""`steerbridge run`: which programs it takes, what it tells, a plain llama-cpp-python script."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

import helpers
from helpers import MEAN, head, linear_probe, reading, rule

pytest.importorskip("elftools", reason="needs the extra `run`")

from steerbridge import gguf_model
from steerbridge.errors import UnsupportedFeature
from steerbridge_run import preload, programs, supervisor

CLI = [sys.executable, "-m", "steerbridge.cli"]
LOW = {"form": "low_rank", "u": "h.u", "v": "h.v"}


def package(path, limit, folder, readings=None, act=None):
    """A package of one probe on SmolLM2, saved."""
    act = act or head(weight=LOW, eps=3.0)
    made = helpers.package(
        gguf_model.read_facts(path),
        scale=0.05,
        probes=[linear_probe(readings=readings or [reading("layer_input[22]")], threshold=limit)],
        interventions=[act],
        rules=[rule(["p"], [act["id"]])],
    )
    return made.save(folder / f"{limit:g}.gguf")


def compiled(folder, source, *options):
    """A C program."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    path = folder / f"program{len(list(folder.iterdir()))}"
    subprocess.run(
        [compiler, "-x", "c", "-", "-o", path, *options], input=source.encode(), check=True
    )
    return path


# ---------------------------------------------------------------- programs


def test_dynamic_programs_and_scripts_are_taken(tmp_path):
    found = programs.inspect(sys.executable)
    assert found.interpreter is None
    assert not found.names_llama
    script = tmp_path / "app"
    script.write_text(f"#!/usr/bin/env {Path(sys.executable).name}\nprint(1)\n")
    script.chmod(0o755)
    found = programs.inspect(str(script))
    assert found.path == script
    assert found.interpreter is not None
    assert any(name.startswith("libc.") for name in found.runs.libraries)


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("int main(void) { return 0; }", ["-static"], "statically"),
        ("int llama_decode(void) { return 0; } int main(void) { return 0; }", [], "into it"),
        (
            'const char *name = "llama_model_loader: %s"; int main(void) { return name[0] == 0; }',
            ["-s"],
            "into it",
        ),
    ],
)
def test_programs_that_no_preload_reaches_are_refused(tmp_path, source, options, reason):
    path = compiled(tmp_path, source, *options)
    with pytest.raises(UnsupportedFeature, match=reason):
        programs.inspect(str(path))


def test_programs_with_privileges_are_refused(tmp_path):
    path = compiled(tmp_path, "int main(void) { return 0; }")
    programs.inspect(str(path))
    path.chmod(0o4755)
    with pytest.raises(UnsupportedFeature, match="privileges"):
        programs.inspect(str(path))
    with pytest.raises(FileNotFoundError):
        programs.inspect("no-such-program-here")


def mach_o(path, *libraries, tail=b""):
    """A program for macOS, as far as its header tells."""
    commands = []
    for name in libraries:
        text = name.encode() + b"\0" * (8 - len(name) % 8)
        # LC_LOAD_DYLIB; size; where the name is; time and versions of the library
        commands.append(struct.pack("<6I", 0xC, 24 + len(text), 24, 0, 0, 0) + text)
    body = b"".join(commands)
    # magic, arm64, any of them, a program, load commands, flags
    header = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 2, len(commands), len(body), 0, 0)
    path.write_bytes(header + body + tail)
    path.chmod(0o755)
    return str(path)


def test_programs_of_macos(tmp_path):
    """Their preload was compiled (see docs/run.md) and never run: what can be told, is told."""
    linked = mach_o(tmp_path / "linked", "/usr/lib/libSystem.B.dylib", "@rpath/libllama.dylib")
    found = programs.inspect(linked, "darwin")
    assert found.names_llama
    assert len(found.libraries) == 2
    with pytest.raises(UnsupportedFeature, match="linked into it"):
        programs.inspect(mach_o(tmp_path / "whole", tail=b"llama_model_loader"), "darwin")
    (tmp_path / "text").write_text("no program, and long enough to look at")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(UnsupportedFeature, match="neither a program nor a script"):
        programs.inspect(str(tmp_path / "text"), "darwin")
    script = tmp_path / "app"
    script.write_text("#!/usr/bin/env python3\n")
    script.chmod(0o755)
    with pytest.raises(UnsupportedFeature, match="belongs to macOS"):
        programs.inspect(str(script), "darwin")


def test_models_on_the_command_line_are_found(tmp_path):
    one, two = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one.touch()
    two.touch()
    command = ["llama-server", "--model", str(one), f"-md={two}", "-m"]
    assert preload.named_models(command, {}) == preload.Models(one, (two,))
    assert preload.named_models(["x", "-m", "gone.gguf"], {}).main is None
    assert preload.named_models(["x"], {"LLAMA_ARG_MODEL": str(two)}).main == two


def test_the_environment_names_what_the_preload_needs(tmp_path, smollm2_path):
    from steerbridge.package import load

    end = load(package(smollm2_path, 1, tmp_path))
    mean = load(package(smollm2_path, 2, tmp_path, [reading("layer_input[22]", MEAN)]))
    before = {"LD_PRELOAD": "/other.so", "HOME": "/h"}
    made = preload.environment(end, tmp_path / "p", tmp_path / "e", [smollm2_path], before)
    assert made["LD_PRELOAD"] == f"{preload.library()}:/other.so"
    assert made["STEERBRIDGE_UNSTEERED"] == "llama:576:30"
    assert made["STEERBRIDGE_VOCABULARY"] == "49152"
    assert made["HOME"] == "/h"
    assert "LLAMA_ARG_CACHE_RAM" not in made
    assert made["STEERBRIDGE_IGNORE"] == ""
    ignore = ["vocab_size", "chat_template_sha256"]
    made = preload.environment(mean, tmp_path / "p", tmp_path / "e", [], before, ignore=ignore)
    assert made["LLAMA_ARG_CACHE_RAM"] == "0"
    assert made["STEERBRIDGE_VOCABULARY"] == ""
    assert made["STEERBRIDGE_IGNORE"] == "vocab_size,chat_template_sha256"


# ---------------------------------------------------------------- supervisor


def test_events_are_logged_and_counted(tmp_path, capsys):
    log, metrics = io.StringIO(), supervisor.Metrics()
    listener = supervisor.Supervisor(tmp_path / "events", log, metrics)
    verdict = {
        "event": "verdict",
        "pid": 7,
        "fired": ["refuse"],
        "probes": [{"probe": "p", "score": 0.9}, {"probe": "q", "score": None}],
    }
    lines = [{"event": "active", "pid": 7, "model": "m"}, verdict, {"event": "refused", "pid": 7}]
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(str(tmp_path / "events"))
        sender.sendall("".join(json.dumps(line) + "\n" for line in lines).encode())
        sender.sendall(b'{"event": "verd')  # killed within a line
    while log.getvalue().count("\n") < 3:
        time.sleep(0.01)
    listener.close()
    assert [json.loads(line) for line in log.getvalue().splitlines()] == lines
    assert listener.active == 1
    assert "active in process 7: m" in capsys.readouterr().err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    metrics.serve(port)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'steerbridge_verdicts_total{fired="true"} 1.0' in text
    assert 'steerbridge_rules_fired_total{rule="refuse"} 1.0' in text
    assert 'steerbridge_stopped_total{event="refused"} 1.0' in text


def test_the_log_may_be_a_socket_and_may_fail(tmp_path, capsys):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "log"))
        listening.listen()
        log = supervisor.open_log(f"unix:{tmp_path / 'log'}")
        taken, _ = listening.accept()
    metrics = supervisor.Metrics()
    listener = supervisor.Supervisor(tmp_path / "events", log, metrics)
    with socket.socket(socket.AF_UNIX) as sender, taken.makefile("r") as lines:
        sender.connect(str(tmp_path / "events"))
        sender.sendall(b'{"event": "refused", "pid": 1}\n')
        assert json.loads(lines.readline()) == {"event": "refused", "pid": 1}
        taken.close()
        lines.close()
        for _ in range(3):  # what is written after the other side has gone
            sender.sendall(b'{"event": "refused", "pid": 2}\n')
    listener.close()
    assert metrics.registry.get_sample_value("steerbridge_stopped_total", {"event": "refused"}) == 4
    assert "the log is given up" in capsys.readouterr().err


EVENT = """
#include "events.h"
int main(void) {
    sb_event event;
    sb_event_begin(&event, "verdict");
    sb_event_open(&event, "probes", '[');
    for (int i = 0; i < 500; i++) {
        sb_event_open(&event, 0, '{');
        sb_event_text(&event, "probe", "a name with \\"quotes\\" %d", i);
        sb_event_number(&event, "score", 0.5);
        sb_event_close(&event, '}');
    }
    sb_event_close(&event, ']');
    sb_event_send(&event);
    return 0;
}
"""


def test_a_line_that_is_too_long_is_cut_between_fields(tmp_path):
    native = Path(preload.__file__).parent / "native"
    source = f'#include "{native}/events.c"\n{EVENT}'
    program = compiled(tmp_path, source, f"-I{native}", "-g", "-fsanitize=address,undefined")
    sink = tmp_path / "events.jsonl"
    environment = {**os.environ, "STEERBRIDGE_EVENTS": str(sink)}
    subprocess.run([program], env=environment, check=True)
    found = json.loads(sink.read_text())["probes"]
    assert 50 < len(found) < 500
    assert all(probe["score"] == 0.5 for probe in found[:-1])


def test_exit_codes_and_signals_are_the_programs_own():
    assert supervisor.run([sys.executable, "-c", "raise SystemExit(3)"], os.environ) == 3
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert supervisor.run([sys.executable, "-c", kill], os.environ) == 128 + 9


# ---------------------------------------------------------------- a Python script, unmodified

SCRIPT = """
import json, sys
import llama_cpp
options = json.loads(sys.argv[2])
llama = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=2, verbose=False, **options)
for text in sys.argv[3:]:
    prompt = llama.tokenize(text.encode())
    found = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == 8:
            break
    print(json.dumps(found), flush=True)
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
    """Run under `steerbridge run`; the completed process and the events."""
    log = log or guard.with_suffix(".jsonl")
    done = subprocess.run(
        [*CLI, "run", "--package", str(guard), "--log", str(log), *options, "--", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done, events


def answers(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("position", ["prompt_end", "mean"])
def test_a_script_answers_as_the_adapter_does(tmp_path, smollm2_path, position):
    """Prompts that share a prefix, so that the later ones begin with cached rows."""
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


def test_programs_without_models_run_as_ever(tmp_path, smollm2_path):
    done, events = steered(
        package(smollm2_path, 1, tmp_path), [sys.executable, "-c", "print('[1]')"]
    )
    assert answers(done) == [[1]]
    assert events == []
    assert "nothing was steered" in done.stderr


def test_another_model_ends_the_program_before_its_first_token(tmp_path, smollm2_path):
    pytest.importorskip("llama_cpp")
    facts = gguf_model.read_facts(smollm2_path)
    for change, reason in (({"num_layers": 28}, "blocks"), ({"vocab_size": 49160}, "vocabulary")):
        from dataclasses import replace

        made = helpers.package(
            replace(facts, **change),
            probes=[linear_probe(readings=[reading("layer_input[22]")])],
            interventions=[head(weight=LOW)],
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


def test_logits_of_a_whole_prompt_are_refused(tmp_path, smollm2_path):
    """Where a prompt ends could not be told."""
    pytest.importorskip("llama_cpp")
    command = [*script(tmp_path), str(smollm2_path), '{"logits_all": true}', TEXTS[0]]
    done, events = steered(package(smollm2_path, 1, tmp_path), command, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert events[-1]["event"] == "failed"


def test_doctor_says_what_would_happen(tmp_path, smollm2_path):
    guard = package(smollm2_path, 1, tmp_path)
    command = [sys.executable, "-m", str(smollm2_path)]
    done = subprocess.run(
        [*CLI, "doctor", "--json", "--package", str(guard), "--", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["model"]["architecture"] == "llama"
    bad = compiled(tmp_path, "int main(void) { return 0; }", "-static")
    done = subprocess.run(
        [*CLI, "doctor", "--", str(bad)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "statically" in done.stdout
